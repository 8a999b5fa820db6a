"""VideoMAE (Tong et al., NeurIPS 2022): a ViT over tubelets of 2 x 16 x 16 pixels, clips of 16 frames.

    tubelets + sin-cos positions -> blocks -> mean over H and W -> norm
    block:  x = x + attention(layernorm_before(x));  x = x + output(intermediate(layernorm_after(x)))

Checkpoints fine-tuned for recognition have no final norm on the tokens but one after pooling, `fc_norm`. It is kept,
per step; where the weights hold none, it starts as the identity that it starts fine-tuning from.
"""

from __future__ import annotations

from torch import Tensor, nn
from transformers import VideoMAEConfig, VideoMAEForVideoClassification
from transformers.models.videomae.modeling_videomae import VideoMAEEmbeddings, VideoMAELayer

from re2tal.backbones.base import BackboneConfig
from re2tal.backbones.hub.prenorm import attention_branch, mlp_branch
from re2tal.backbones.hub.pretrained import NANO, add_drop_path, clipwise, load_model, weights_file
from re2tal.backbones.hub.tiling import ClipEncoder, ClipwiseBackbone, pair, resize_positions
from re2tal.backbones.hub.videomae_layouts import ORIGINAL, ends_in_token_norm
from re2tal.backbones.weights import read_state
from re2tal.rewire import Branch, residual_branches

SIZES: dict[str, dict] = {
    "videomae_nano": NANO | {"image_size": 32, "patch_size": 8, "num_frames": 4},
    "videomae_small": {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6},
    "videomae_base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
    "videomae_large": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16},
    "videomae_huge": {"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 16},
}


def build(config: BackboneConfig) -> ClipwiseBackbone:
    """The size that `config.name` names, random or from `config.weights` (MCG-NJU/videomae-base, a folder, ...)."""
    size = SIZES[config.name]
    file = weights_file(config.weights)
    model = load_model(
        VideoMAEForVideoClassification,
        VideoMAEConfig(
            **size,
            intermediate_size=4 * size["hidden_size"],
            use_mean_pooling=file is None or not ends_in_token_norm(read_state(file)),
        ),
        weights=config.weights,
        kinds=("videomae",),
        optional=("fc_norm.", "classifier."),
    )
    add_drop_path(model.videomae.encoder.layer, config.drop_path, after=("attention.output.dropout", "output.dropout"))
    return clipwise(VideoMAEEncoder(model), config, layouts=(ORIGINAL,))


class VideoMAEEncoder(ClipEncoder):
    """A transformers VideoMAE without its classifier, for frames of any size."""

    def __init__(self, model: VideoMAEForVideoClassification) -> None:
        super().__init__()
        config = model.config
        self.model = model
        self.model.classifier = nn.Identity()
        self.model.videomae.embeddings.__class__ = ResizableEmbeddings  # the same parameters, another forward
        self.out_channels = config.hidden_size
        self.clip_frames = config.num_frames
        self.size = pair(config.image_size)
        self.patch = (config.tubelet_size, *pair(config.patch_size))

    def forward(self, clips: Tensor) -> Tensor:
        """(N, L, 3, H, W) -> (N, L / 2, C)."""
        tokens = self.model.videomae(clips).last_hidden_state
        pooled = tokens.unflatten(1, (self.clip_frames // self.patch[0], -1)).mean(dim=2)
        # Pre-trained checkpoints have normed the tokens instead.
        return pooled if self.model.fc_norm is None else self.model.fc_norm(pooled)


class ResizableEmbeddings(VideoMAEEmbeddings):
    """Tubelets plus their positions, which are resampled where frames are not of the size trained on."""

    def forward(self, pixel_values: Tensor, bool_masked_pos: None) -> Tensor:
        """(N, L, 3, H, W) -> (N, tokens, C)."""
        patches = self.patch_embeddings.projection(pixel_values.transpose(1, 2))
        size, patch = pair(self.config.image_size), pair(self.config.patch_size)
        rows, columns = size[0] // patch[0], size[1] // patch[1]
        positions = resize_positions(
            self.position_embeddings.to(patches),
            grid=(self.num_patches // (rows * columns), rows, columns),
            new_grid=(patches.shape[2], patches.shape[3], patches.shape[4]),
        )
        return patches.flatten(2).transpose(1, 2) + positions


@residual_branches.register
def _(block: VideoMAELayer) -> tuple[Branch, ...]:
    # `output` as a whole would add its input a second time.
    return (
        attention_branch("layernorm_before", "attention", last="attention.output.dense"),
        mlp_branch("layernorm_after", "intermediate", "output.dense", "output.dropout", last="output.dense"),
    )
