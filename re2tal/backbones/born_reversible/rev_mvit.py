"""RevViT and Rev-MViT (Mangalam et al., CVPR 2022), which were reversible before anybody rewired them.

    x -> (x, x) -> y1 = x1 + F(x2), y2 = x2 + G(y1), .. -> (y1, y2)      F attention, G MLP, each behind a norm
    between such runs    mean of both streams -> attention whose queries are pooled, twice the channels -> MLP
    at the end           norm of both, side by side -> mean over H and W

`rewire(model)` keeps the function and runs its blocks reversibly, with the two streams as the first states of a run and
its last. No weight means anything else than in PySlowFast, whose names these are.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import cast

import torch
from torch import Tensor, nn

from re2tal.backbones.base import VideoBackbone, steps_mask
from re2tal.backbones.born_reversible.rev_mvit_blocks import Attention, ReversibleBlock, Size, TransitionBlock
from re2tal.backbones.weights import KeyLayout, each
from re2tal.structures import Features

PYSLOWFAST = KeyLayout("PySlowFast", r"rev_backbone\.layers\.0\.F\.norm\.weight", to_ours=each(without=r"head\."))

SIZES: dict[str, dict] = {
    "rev_mvit_nano": {"frames": 4, "size": 32, "channels": 16, "depth": 5, "pool_at": {1: (1, 2, 2), 3: (1, 2, 2)}}
    | {"kv_stride": (1, 4, 4)},
    "rev_mvit_base_16x4": {"frames": 16, "size": 224, "channels": 96, "depth": 16, "kv_stride": (1, 8, 8)}
    | {"pool_at": {1: (1, 2, 2), 3: (1, 2, 2), 14: (1, 2, 2)}},
    "rev_vit_nano": {"frames": 1, "size": 32, "channels": 32, "depth": 4, "heads": 2, "patch": 8, "qkv_bias": True},
    "rev_vit_small": {"frames": 1, "size": 224, "channels": 384, "depth": 12, "heads": 6, "patch": 16}
    | {"qkv_bias": True},
    "rev_vit_base": {"frames": 1, "size": 224, "channels": 768, "depth": 12, "heads": 12, "patch": 16}
    | {"qkv_bias": True},
}


class RevMViT(VideoBackbone):
    """Clips of one length and size: (B, 3, T, H, W) -> features (B, 2 x last channels, T / frames_per_step)."""

    def __init__(
        self,
        *,
        frames: int,
        size: int,
        channels: int,
        depth: int,
        heads: int = 1,
        patch: int | None = None,
        pool_at: Mapping[int, Size] | None = None,
        kv_stride: Size | None = None,
        qkv_bias: bool = False,
        drop_path: float = 0.0,
    ) -> None:
        """Args:
        frames: of a clip; 1 for a network of pictures, which takes each frame for itself.
        size: rows and columns of a frame, in pixels.
        channels: of the first blocks; they double, as heads do, in every block of `pool_at`.
        depth: number of blocks.
        heads: of the first blocks.
        patch: side of a picture's patch; None for the overlapping tubes of 3 x 7 x 7, 2 x 4 x 4 apart, of video.
        pool_at: blocks that end a run, and the strides of their queries.
        kv_stride: stride of the first block's keys and values; it falls as queries are pooled. None for no pooling.
        qkv_bias: whether queries, keys and values have one.
        drop_path: rate of the last block; it grows linearly from 0 at the first.
        """
        super().__init__()
        self.frames, self.size = frames, size
        self.frames_per_step = 1 if patch else 2
        self.patch_embed = PatchEmbed(channels, patch)
        grid = (1, size // patch, size // patch) if patch else (frames // 2, size // 4, size // 4)
        if patch:
            self.pos_embed = nn.Parameter(torch.zeros(1, prod(grid), channels))
        else:
            self.pos_embed_spatial = nn.Parameter(torch.zeros(1, grid[1] * grid[2], channels))
            self.pos_embed_temporal = nn.Parameter(torch.zeros(1, grid[0], channels))
        self.rev_backbone = RevBackbone(
            channels,
            grid,
            depth=depth,
            heads=heads,
            pool_at=pool_at or {},
            kv_stride=kv_stride,
            qkv_bias=qkv_bias,
            separate_qkv=patch is not None,
            drop_path=drop_path,
        )
        self.out_channels = 2 * self.rev_backbone.out_channels
        self.norm = nn.LayerNorm(self.out_channels, eps=1e-6)
        self.apply(_initialise)
        for name, parameter in self.named_parameters():
            if name.startswith("pos_embed"):
                nn.init.trunc_normal_(parameter, std=0.02)

    def forward(self, frames: Tensor, mask: Tensor) -> Features:
        """Raises ValueError for clips of another length or size than the network was made for."""
        batch, _, length, *size = frames.shape
        pictures = self.frames_per_step == 1
        if size != [self.size, self.size] or not (pictures or length == self.frames):
            raise ValueError(
                f"this network takes clips of {self.frames} frames of {self.size} x {self.size}, and got "
                f"{tuple(frames.shape)}; resize them, or build it for that size"
            )
        if pictures:
            frames = frames.transpose(1, 2).flatten(0, 1)
        x = self.patch_embed(frames)
        if pictures:
            x = x + self.pos_embed
        else:
            spatial, temporal = self.pos_embed_spatial, self.pos_embed_temporal
            x = x + (spatial[:, None] + temporal[:, :, None]).flatten(1, 2)
        x, grid = self.rev_backbone(x)
        steps = self.norm(x).unflatten(1, (grid[0], -1)).mean(dim=2)
        values = steps.reshape(batch, -1, self.out_channels).transpose(1, 2)
        return Features(values, steps_mask(mask, frames_per_step=self.frames_per_step))


class PatchEmbed(nn.Module):
    """Tokens, row by row and frame by frame."""

    def __init__(self, channels: int, patch: int | None) -> None:
        super().__init__()
        self.proj: nn.Module
        if patch is None:
            self.proj = nn.Conv3d(3, channels, (3, 7, 7), stride=(2, 4, 4), padding=(1, 3, 3))
        else:
            self.proj = nn.Conv2d(3, channels, patch, stride=patch)

    def forward(self, frames: Tensor) -> Tensor:
        """(B, 3, T, H, W), or (B, 3, H, W) of pictures -> (B, tokens, C)."""
        return self.proj(frames).flatten(2).transpose(1, 2)


class RevBackbone(nn.Module):
    """All blocks: reversible runs, and transitions between them."""

    def __init__(
        self,
        channels: int,
        grid: Size,
        *,
        depth: int,
        heads: int,
        pool_at: Mapping[int, Size],
        kv_stride: Size | None,
        qkv_bias: bool,
        separate_qkv: bool,
        drop_path: float,
    ) -> None:
        """As `RevMViT`; `grid` is that of the first block."""
        super().__init__()
        self.grid = grid
        self.layers = nn.ModuleList()
        for index in range(depth):
            width, stride = channels, pool_at.get(index)
            if stride is not None:
                channels, heads = 2 * channels, 2 * heads
                kv_stride = _less(kv_stride, stride)
            attention = Attention(
                width,
                channels,
                heads=heads,
                q_stride=stride,
                kv_stride=kv_stride,
                bias=qkv_bias,
                separate=separate_qkv,
            )
            make = TransitionBlock if stride is not None else ReversibleBlock
            self.layers.append(make(width, channels, attention, drop_path=drop_path * index / max(1, depth - 1)))
        self.out_channels = channels

    def forward(self, x: Tensor) -> tuple[Tensor, Size]:
        """(B, tokens, C) -> both streams side by side (B, tokens', 2 C'), and their grid."""
        x, grid = torch.cat((x, x), dim=-1), self.grid
        for layer in self.layers:
            x, grid = layer(x, grid), layer.pooled(grid)  # type: ignore[operator]
        return x, grid


def _less(kv_stride: Size | None, q_stride: Size) -> Size | None:
    """So that keys keep their number of tokens."""
    if kv_stride is None:
        return None
    return cast("Size", tuple(max(k // q, 1) for k, q in zip(kv_stride, q_stride, strict=True)))


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
