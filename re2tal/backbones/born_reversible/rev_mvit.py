"""RevViT and Rev-MViT (Mangalam et al., CVPR 2022), which were reversible before anybody rewired them.

    x -> (x, x) -> y1 = x1 + F(x2), y2 = x2 + G(y1), .. -> (y1, y2)      F attention, G MLP, each behind a norm
    between such runs    mean of both streams -> attention whose queries are pooled, twice the channels -> MLP
    at the end           norm of both, side by side -> mean over H and W

The two streams are the first states of a run and its last, so `run_reversibly` runs them as they are; nothing is
merged, and no weight means anything else than in PySlowFast, whose names these are.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from math import prod
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from re2tal.backbones.base import VideoBackbone, steps_mask
from re2tal.backbones.swin3d.network import DropPath, Mlp
from re2tal.backbones.weights import KeyLayout, each
from re2tal.reversible import run_reversibly
from re2tal.rewire import CheckpointedModule, checkpointed
from re2tal.structures import Features

Size = tuple[int, int, int]
"""Of a grid of tokens: T, H, W."""

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

    recompute: bool = True
    """Rebuild activations in backward instead of saving them."""

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
        x, grid = self.rev_backbone(x, recompute=self.recompute)
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

    def forward(self, x: Tensor, *, recompute: bool) -> tuple[Tensor, Size]:
        """(B, tokens, C) -> both streams side by side (B, tokens', 2 C'), and their grid."""
        grid = self.grid
        for is_transition, group in groupby(self.layers, key=lambda layer: isinstance(layer, TransitionBlock)):
            if is_transition:
                for layer in group:
                    layer.checkpointing = recompute  # type: ignore[assignment]
                    x = layer(x, grid)
                    grid = layer.pooled(grid)  # type: ignore[operator]
            else:
                branches = [branch for layer in group for branch in layer.branches(grid)]  # type: ignore[operator]
                pair = run_reversibly(
                    branches, torch.stack((x, x)), streams=True, recompute=recompute, owner=self.layers
                )
                x = torch.cat((pair[0], pair[1]), dim=-1)
        return x, grid


def _less(kv_stride: Size | None, q_stride: Size) -> Size | None:
    """So that keys keep their number of tokens."""
    if kv_stride is None:
        return None
    return cast("Size", tuple(max(k // q, 1) for k, q in zip(kv_stride, q_stride, strict=True)))


class ReversibleBlock(nn.Module):
    """y1 = x1 + F(x2), y2 = x2 + G(y1)."""

    def __init__(self, width: int, channels: int, attention: Attention, *, drop_path: float) -> None:
        super().__init__()
        self.F, self.G = AttentionHalf(width, attention), MlpHalf(channels)
        self.drop_path = DropPath(drop_path)

    def branches(self, grid: Size) -> tuple:
        """F and G, for a reversible run."""
        return (lambda x: self.drop_path(self.F(x, grid))), (lambda x: self.drop_path(self.G(x)))


class TransitionBlock(CheckpointedModule):
    """Where channels and resolution change: an ordinary block of the mean of both streams."""

    def __init__(self, width: int, channels: int, attention: Attention, *, drop_path: float) -> None:
        super().__init__()
        self.F, self.G = AttentionHalf(width, attention), MlpHalf(channels)
        self.res_proj = nn.Linear(width, channels)
        self.drop_path = DropPath(drop_path)

    @checkpointed
    def forward(self, x: Tensor, grid: Size) -> Tensor:
        """(B, tokens, 2 C) -> (B, fewer tokens, C')."""
        first, second = x.chunk(2, dim=-1)
        x = (first + second) / 2
        skip = self.F.attn.pooled_skip(self.res_proj(x), grid)
        x = skip + self.F(x, grid)
        return self.drop_path(x + self.G(x))

    def pooled(self, grid: Size) -> Size:
        """The grid of what it returns."""
        stride = cast("nn.Conv3d", self.F.attn.pool_q).stride
        return cast("Size", tuple(-(-side // step) for side, step in zip(grid, stride, strict=True)))


class AttentionHalf(nn.Module):
    """A norm and attention."""

    def __init__(self, width: int, attention: Attention) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.attn = attention

    def forward(self, x: Tensor, grid: Size) -> Tensor:
        """(B, tokens, C) -> (B, pooled tokens, C')."""
        return self.attn(self.norm(x), grid)


class MlpHalf(nn.Module):
    """A norm and an MLP of four times the width."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.mlp = Mlp(channels, hidden=4 * channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, tokens, C) -> the same shape."""
        return self.mlp(self.norm(x))


class Attention(nn.Module):
    """Attention whose queries, keys and values are pooled head by head, each by a depthwise convolution and a norm."""

    def __init__(
        self,
        width: int,
        channels: int,
        *,
        heads: int,
        q_stride: Size | None,
        kv_stride: Size | None,
        bias: bool,
        separate: bool,
    ) -> None:
        """`separate`: queries, keys and values are three layers, not one."""
        super().__init__()
        self.heads = heads
        if separate:
            self.q, self.k, self.v = (nn.Linear(width, channels, bias=bias) for _ in "qkv")
        else:
            self.qkv = nn.Linear(width, 3 * channels, bias=bias)
        self.proj = nn.Linear(channels, channels)
        for name, stride in (("q", q_stride), ("k", kv_stride), ("v", kv_stride)):
            each_head = channels // heads
            pool = stride and nn.Conv3d(each_head, each_head, 3, stride, padding=1, groups=each_head, bias=False)
            self.add_module(f"pool_{name}", pool)
            self.add_module(f"norm_{name}", nn.LayerNorm(each_head, eps=1e-6) if pool else None)

    def forward(self, x: Tensor, grid: Size) -> Tensor:
        """(B, tokens, C) -> (B, pooled tokens, C')."""
        parts = self.qkv(x).chunk(3, dim=-1) if hasattr(self, "qkv") else (self.q(x), self.k(x), self.v(x))
        q, k, v = (self._pool(name, self._by_head(part), grid) for name, part in zip("qkv", parts, strict=True))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def pooled_skip(self, x: Tensor, grid: Size) -> Tensor:
        """(B, tokens, C') pooled as queries are."""
        return self._pool("q", self._by_head(x), grid).transpose(1, 2).flatten(2)

    def _by_head(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _pool(self, name: str, x: Tensor, grid: Size) -> Tensor:
        pool, norm = getattr(self, f"pool_{name}"), getattr(self, f"norm_{name}")
        if pool is None:
            return x
        video = x.flatten(0, 1).transpose(1, 2).unflatten(2, grid)
        return norm(pool(video).flatten(2).transpose(1, 2).unflatten(0, x.shape[:2]))


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
