"""VideoPrism (Zhao et al., ICML 2024): blocks over the patches of a frame, then over the frames of a patch.

18 x 18 patches + positions -> blocks -> norm -> + frame positions -> blocks -> norm -> mean over H and W
block:  x = x + dropout(attention(layernorm_before(x)));  x = x + dropout(mlp(layernorm_after(x)))
"""

from __future__ import annotations

from torch import Tensor
from transformers import VideoPrismVisionConfig, VideoPrismVisionModel
from transformers.models.videoprism.modeling_videoprism import VideoPrismLayer

from re2tal.backbones.base import BackboneConfig
from re2tal.backbones.hub.prenorm import attention_branch, mlp_branch
from re2tal.backbones.hub.pretrained import add_drop_path, clipwise, load_model
from re2tal.backbones.hub.tiling import ClipEncoder, ClipwiseBackbone, pair
from re2tal.rewire import Branch, residual_branches

SIZES: dict[str, dict] = {
    "videoprism_nano": {"hidden_size": 48, "num_attention_heads": 2, "intermediate_size": 96, "num_frames": 4}
    | {"num_spatial_layers": 4, "num_temporal_layers": 2, "image_size": 32, "tubelet_size": (1, 8, 8)},
    "videoprism_base": {},
    "videoprism_large": {"hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 4096}
    | {"num_spatial_layers": 24, "num_frames": 8},
}


def build(config: BackboneConfig) -> ClipwiseBackbone:
    """The size that `config.name` names, random or from `config.weights` (google/videoprism-base-f16r288)."""
    size, kinds = VideoPrismVisionConfig(**SIZES[config.name]), ("videoprism_vision_model", "videoprism")
    model = load_model(VideoPrismVisionModel, size, weights=config.weights, kinds=kinds)
    add_drop_path([*model.spatial_layers, *model.temporal_layers], config.drop_path, after=("dropout",))
    return clipwise(VideoPrismEncoder(model), config)


class VideoPrismEncoder(ClipEncoder):
    """A transformers VideoPrism vision model for frames of any size."""

    def __init__(self, model: VideoPrismVisionModel) -> None:
        super().__init__()
        self.model = model
        self.out_channels = model.config.hidden_size
        self.clip_frames = model.config.num_frames
        self.size = pair(model.config.image_size)
        self.patch = (1, *pair(model.config.tubelet_size[1:]))

    def forward(self, clips: Tensor) -> Tensor:
        """(N, L, 3, H, W) -> (N, L, C)."""
        tokens = self.model(clips, interpolate_pos_encoding=True).last_hidden_state
        return tokens.unflatten(1, (self.clip_frames, -1)).mean(dim=2)


@residual_branches.register
def _(block: VideoPrismLayer) -> tuple[Branch, ...]:
    return (
        attention_branch("layernorm_before", "attention", "dropout", last="attention.o_proj"),
        mlp_branch("layernorm_after", "mlp", "dropout", last="mlp.fc2"),
    )
