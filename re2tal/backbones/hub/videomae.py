"""VideoMAE (Tong et al., NeurIPS 2022): a ViT over tubelets of 2 x 16 x 16 pixels, clips of 16 frames.

    tubelets + sin-cos positions -> blocks -> mean over H and W -> norm
    block:  x = x + attention(layernorm_before(x));  x = x + output(intermediate(layernorm_after(x)))
            x = x + adapter(x), with AdaTAD's adapters

Pre-trained checkpoints end in a norm over tokens. Those fine-tuned for recognition have one after pooling instead,
`fc_norm`, which is applied to every step; where the weights hold neither, it starts as the identity. With AdaTAD's
adapters features have no such norm, as AdaTAD's have none. VideoMAE V2's giant differs only in its sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import VideoMAEConfig, VideoMAEForVideoClassification
from transformers.models.videomae.modeling_videomae import (
    VideoMAEEmbeddings,
    VideoMAELayer,
    get_sinusoid_encoding_table,
)

from re2tal.backbones.adapters.temporal import TemporalAdapter, by_positions
from re2tal.backbones.base import BackboneConfig
from re2tal.backbones.hub.prenorm import attention_branch, mlp_branch
from re2tal.backbones.hub.pretrained import NANO, add_drop_path, clipwise, load_model, weights_file
from re2tal.backbones.hub.tiling import ClipEncoder, ClipwiseBackbone, pair, resize_positions
from re2tal.backbones.hub.videomae_layouts import MMACTION, ORIGINAL, ends_in_token_norm
from re2tal.backbones.weights import read_state
from re2tal.rewire import Branch, residual_branches

SIZES: dict[str, dict] = {
    "videomae_nano": NANO | {"image_size": 32, "patch_size": 8, "num_frames": 4},
    "videomae_small": {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6},
    "videomae_base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
    "videomae_large": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16},
    "videomae_huge": {"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 16},
    # VideoMAE V2 (Wang et al., CVPR 2023).
    "videomae_giant": {"hidden_size": 1408, "num_hidden_layers": 40, "num_attention_heads": 16}
    | {"intermediate_size": 6144, "patch_size": 14},
}
EPS = 1e-6
"""Of every norm in the code bases that trained these networks. The library's default differs."""


def build(config: BackboneConfig) -> ClipwiseBackbone:
    """The size that `config.name` names, random or from `config.weights` (MCG-NJU/videomae-base, a folder, ...)."""
    size = SIZES[config.name]
    file = weights_file(config.weights)
    # Only transformers 5.17 asks for them, and `VideoMAEEncoder` takes them away.
    keys = (f"videomae.encoder.layer.{n}.attention.attention.key.bias" for n in range(size["num_hidden_layers"]))
    model = load_model(
        VideoMAEForVideoClassification,
        VideoMAEConfig(
            **{"intermediate_size": 4 * size["hidden_size"], "layer_norm_eps": EPS} | size,
            use_mean_pooling=file is None or not ends_in_token_norm(read_state(file)),
        ),
        weights=config.weights,
        kinds=("videomae",),
        optional=("fc_norm.", "classifier.", *keys),
    )
    if model.fc_norm is not None:
        model.fc_norm.eps = model.config.layer_norm_eps
    add_drop_path(model.videomae.encoder.layer, config.drop_path, after=("attention.output.dropout", "output.dropout"))
    encoder = VideoMAEEncoder(model)
    if config.adapter == "temporal":
        encoder.add_adapters(config.adapter_blocks, ratio=config.adapter_ratio)
    return clipwise(encoder, config, layouts=(MMACTION, ORIGINAL))


class VideoMAEEncoder(ClipEncoder):
    """A transformers VideoMAE without its classifier, for frames of any size."""

    def __init__(self, model: VideoMAEForVideoClassification) -> None:
        super().__init__()
        config = model.config
        self.model = model
        self.model.classifier = nn.Identity()
        for layer in self.model.videomae.encoder.layer:
            # transformers 5.17 has one, other versions and code bases have none: the softmax over keys undoes it.
            layer.get_submodule("attention.attention.key").register_parameter("bias", None)
        embeddings = self.model.videomae.embeddings
        embeddings.__class__ = ResizableEmbeddings  # the same parameters, another forward
        table = embeddings.position_embeddings
        del embeddings.position_embeddings
        # In the state dict, because not all files have the sinusoid.
        embeddings.register_buffer("position_embeddings", table)
        self.out_channels = config.hidden_size
        self.clip_frames = config.num_frames
        self.size = pair(config.image_size)
        self.patch = (config.tubelet_size, *pair(config.patch_size))

    def add_adapters(self, blocks: Sequence[int] | None, *, ratio: float) -> None:
        """Puts a `TemporalAdapter` behind each of these blocks; None means all. ValueError for unknown blocks."""
        layers = self.model.videomae.encoder.layer
        chosen = range(len(layers)) if blocks is None else blocks
        if not chosen or not set(chosen) <= set(range(len(layers))):
            raise ValueError(
                f"backbone.adapter_blocks is {tuple(chosen)}; this network has blocks 0 to {len(layers) - 1}; give at "
                "least one of them, or None for all"
            )
        hidden, steps = int(self.out_channels * ratio), self.clip_frames // self.patch[0]
        if hidden < 1:
            raise ValueError(
                f"backbone.adapter_ratio is {ratio}, which leaves nothing of {self.out_channels} channels; give at "
                f"least {1 / self.out_channels:.2g}"
            )
        for index, layer in enumerate(layers):
            layer.__class__ = AdaptedLayer  # the same parameters, another forward
            has_one = index in chosen
            layer.adapter = TemporalAdapter(self.out_channels, hidden=hidden, steps=steps) if has_one else None  # type: ignore[assignment]
        self.crosses_clips = True

    def forward(self, clips: Tensor, clips_per_video: int | None = None) -> Tensor:
        """(N, L, 3, H, W) -> (N, L / 2, C). Adapters need `clips_per_video`: they convolve over the whole video."""
        tokens = self.tokens(clips, clips_per_video)
        pooled = tokens.unflatten(1, (self.clip_frames // self.patch[0], -1)).mean(dim=2)
        # Pre-trained checkpoints have normed the tokens instead, and AdaTAD's features are not normed behind the mean.
        return pooled if self.model.fc_norm is None or self.crosses_clips else self.model.fc_norm(pooled)

    def tokens(self, clips: Tensor, clips_per_video: int | None = None) -> Tensor:
        """(N, L, 3, H, W) -> (N, L / 2 * rows * columns, C), after the last block and the norm over tokens, if any."""
        videomae = self.model.videomae
        if clips_per_video is None:
            return videomae(clips).last_hidden_state
        tokens = videomae.embeddings(clips, None)
        for layer in videomae.encoder.layer:
            tokens = layer(tokens, clips_per_video)
        return tokens if videomae.layernorm is None else videomae.layernorm(tokens)

    def take_last_norm(self, names: Iterable[str]) -> None:
        """Ends in a norm over tokens if the network that wrote entries of these names did."""
        if self.model.videomae.layernorm is None and ends_in_token_norm(names):
            config, before = self.model.config, self.model.fc_norm
            assert before is not None
            norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
            # Frozen, if only adapters train.
            self.model.videomae.layernorm = norm.requires_grad_(before.weight.requires_grad)
            self.model.fc_norm = None
            config.use_mean_pooling = False

    def draws_its_positions(self) -> bool:
        """Whether its positions are the sinusoid, which other code computes and does not store in files."""
        table = self.model.videomae.embeddings.position_embeddings
        return torch.allclose(table.float().cpu(), get_sinusoid_encoding_table(*table.shape[1:]), rtol=0, atol=1e-5)


class ResizableEmbeddings(VideoMAEEmbeddings):
    """Tubelets plus positions, which are resampled for frames of another size than the trained one."""

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


class AdaptedLayer(VideoMAELayer):
    """A block, and the adapter behind it, if it has one."""

    adapter: TemporalAdapter | None

    def forward(self, hidden_states: Tensor, clips_per_video: int) -> Tensor:  # type: ignore[override]
        """(N, tokens, C) -> the same shape."""
        x = super().forward(hidden_states)
        return x if self.adapter is None else x + self.adapter(x, clips_per_video=clips_per_video)


@residual_branches.register
def _(block: VideoMAELayer) -> tuple[Branch, ...]:
    # `output` as a whole would add its input a second time.
    return (
        attention_branch("layernorm_before", "attention", last="attention.output.dense"),
        mlp_branch("layernorm_after", "intermediate", "output.dense", "output.dropout", last="output.dense"),
    )


@residual_branches.register
def _(block: AdaptedLayer) -> tuple[Branch, ...]:
    # The branches of a block without adapter, which takes no number of clips.
    plain = tuple(
        replace(branch, function=_alone(branch.function)) for branch in residual_branches.dispatch(VideoMAELayer)(block)
    )
    if block.adapter is None:
        return plain
    return *plain, Branch("adapter", _adapt, cut=by_positions(inner_states=4))


def _alone(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda block, x, clips_per_video: function(block, x)


def _adapt(block: AdaptedLayer, x: Tensor, clips_per_video: int) -> Tensor:
    assert block.adapter is not None
    return block.adapter(x, clips_per_video=clips_per_video)
