"""TimeSformer (Bertasius et al., ICML 2021): attention over time and over space in turn, clips of 8 frames.

    class token, 16 x 16 patches + positions in space and time -> blocks -> norm -> mean over H and W
    block:  x = x + temporal(x);  x = x + spatial(x);  x = x + output(intermediate(layernorm_after(x)))

Tokens are ordered (class, patch, frame). `temporal` leaves the class token alone. `spatial` attends within each frame,
with a copy of the class token in each; the copies are then averaged.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import TimesformerConfig, TimesformerModel
from transformers.models.timesformer.modeling_timesformer import TimesformerEmbeddings, TimesformerLayer

from re2tal.backbones.base import BackboneConfig
from re2tal.backbones.hub.prenorm import attention_branch, mlp_branch
from re2tal.backbones.hub.pretrained import NANO, add_drop_path, clipwise, load_model
from re2tal.backbones.hub.tiling import ClipEncoder, ClipwiseBackbone, pair, resize_positions
from re2tal.rewire import Branch, by_samples, residual_branches, wrap_output

SIZES: dict[str, dict] = {
    "timesformer_nano": NANO | {"image_size": 32, "patch_size": 8, "num_frames": 4, "intermediate_size": 96},
    "timesformer_base": {},
}


def build(config: BackboneConfig) -> ClipwiseBackbone:
    """The size that `config.name` names, random or from `config.weights` (facebook/timesformer-base-finetuned-k400)."""
    model = load_model(
        TimesformerModel, TimesformerConfig(**SIZES[config.name]), weights=config.weights, kinds=("timesformer",)
    )
    add_drop_path(model.encoder.layer, config.drop_path, after=("drop_path",))
    return clipwise(TimesformerEncoder(model), config)


class TimesformerEncoder(ClipEncoder):
    """A transformers TimeSformer for frames of any size."""

    def __init__(self, model: TimesformerModel) -> None:
        super().__init__()
        config = model.config
        if config.attention_type == "space_only":
            raise ValueError(
                "a TimeSformer with attention_type 'space_only' is an image network; use vit_base, or weights of "
                "attention_type 'divided_space_time' or 'joint_space_time'"
            )
        self.model = model
        self.model.embeddings.__class__ = ResizableEmbeddings  # the same parameters, another forward
        self.out_channels = config.hidden_size
        self.clip_frames = config.num_frames
        self.size = pair(config.image_size)
        self.patch = (1, *pair(config.patch_size))
        # Blocks use the picture's width only to fold rows and columns into one axis, so one column of patches fits
        # every picture. The model's own configuration keeps the width of its position table.
        block_config = copy.copy(config)
        block_config.image_size = self.patch[2]
        for block in model.encoder.layer:
            block.config = block_config  # type: ignore[assignment]

    def forward(self, clips: Tensor) -> Tensor:
        """(N, L, 3, H, W) -> (N, L, C)."""
        tokens = self.model(clips).last_hidden_state[:, 1:]
        return tokens.unflatten(1, (-1, self.clip_frames)).mean(dim=1)


class ResizableEmbeddings(TimesformerEmbeddings):
    """Resamples positions for frames of another shape. The library's own does so only for another number of patches."""

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(N, L, 3, H, W) -> (N, 1 + patches * L, C)."""
        patches = self.patch_embeddings.projection(pixel_values.flatten(0, 1))
        sizes = zip(self.patch_embeddings.image_size, self.patch_embeddings.patch_size, strict=True)
        rows, columns = (size // patch for size, patch in sizes)
        positions = resize_positions(
            self.position_embeddings[:, 1:],
            grid=(1, rows, columns),
            new_grid=(1, patches.shape[2], patches.shape[3]),
            mode="nearest",
        )
        tokens = self.pos_drop(patches.flatten(2).transpose(1, 2) + positions)
        frames = tokens.unflatten(0, pixel_values.shape[:2]).transpose(1, 2)
        placed = self.time_drop(frames + self.time_embeddings).flatten(1, 2)
        class_token = (self.cls_token + self.position_embeddings[:, :1]).expand(len(placed), -1, -1)
        return torch.cat([self.pos_drop(class_token), placed], dim=1)


@residual_branches.register
def _(block: TimesformerLayer) -> tuple[Branch, ...]:
    mlp = mlp_branch("layernorm_after", "intermediate", "output", "drop_path", last="output.dense")
    if block.attention_type == "divided_space_time":
        return (
            Branch("temporal attention", _attend_in_time, cut=by_samples(inner_states=10), last="temporal_dense"),
            Branch("spatial attention", _attend_in_space, cut=by_samples(inner_states=10)),
            mlp,
        )
    return attention_branch("layernorm_before", "attention", "drop_path", last="attention.output.dense"), mlp


@wrap_output.register
def _(block: TimesformerLayer, x: Tensor) -> tuple[Tensor]:
    return (x,)


def _attend_in_time(block: TimesformerLayer, x: Tensor, *args: object) -> Tensor:
    """Each patch attends to itself in the other frames: (N, 1 + patches * L, C) -> the same shape, 0 for the class."""
    patches = x[:, 1:].unflatten(1, (-1, block.config.num_frames))
    attended = block.temporal_attention(block.temporal_layernorm(patches.flatten(0, 1)))[0]
    update = block.temporal_dense(block.drop_path(attended).unflatten(0, patches.shape[:2]).flatten(1, 2))
    return F.pad(update, (0, 0, 1, 0))


def _attend_in_space(block: TimesformerLayer, x: Tensor, *args: object) -> Tensor:
    """The patches of each frame and the class token attend to each other; the class gets the mean over frames."""
    frames = x[:, 1:].unflatten(1, (-1, block.config.num_frames)).transpose(1, 2)
    class_token = x[:, None, :1].expand(-1, frames.shape[1], -1, -1)
    tokens = torch.cat([class_token, frames], dim=2)
    attended = block.attention(block.layernorm_before(tokens.flatten(0, 1)))[0]
    update = block.drop_path(attended).unflatten(0, tokens.shape[:2])
    return torch.cat([update[:, :, 0].mean(dim=1, keepdim=True), update[:, :, 1:].transpose(1, 2).flatten(1, 2)], dim=1)
