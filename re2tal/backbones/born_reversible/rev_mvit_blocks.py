"""The blocks of RevViT and Rev-MViT: two streams, which attention and an MLP add to in turn; and transitions."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from re2tal.backbones.swin3d.network import DropPath, Mlp
from re2tal.rewire import (
    Branch,
    CheckpointedModule,
    by_samples,
    by_tokens,
    checkpointed,
    residual_branches,
    stream_axis,
    why_not_residual,
)

Size = tuple[int, int, int]
"""Of a grid of tokens: T, H, W."""


class ReversibleBlock(nn.Module):
    """y1 = x1 + F(x2), y2 = x2 + G(y1)."""

    def __init__(self, width: int, channels: int, attention: Attention, *, drop_path: float) -> None:
        super().__init__()
        self.F, self.G = AttentionHalf(width, attention), MlpHalf(channels)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, grid: Size) -> Tensor:
        """(B, tokens, 2 C) -> the same shape."""
        x1, x2 = x.chunk(2, dim=-1)
        y1 = x1 + self.attend(x2, grid)
        return torch.cat((y1, x2 + self.transform(y1, grid)), dim=-1)

    def attend(self, x: Tensor, grid: Size) -> Tensor:
        """F of a stream."""
        return self.drop_path(self.F(x, grid))

    def transform(self, x: Tensor, grid: Size) -> Tensor:
        """G of a stream, whatever its grid."""
        return self.drop_path(self.G(x))

    def pooled(self, grid: Size) -> Size:
        """The grid of what it returns."""
        return grid


class TransitionBlock(CheckpointedModule):
    """Where channels and resolution change: an ordinary block of the mean of both streams."""

    def __init__(self, width: int, channels: int, attention: Attention, *, drop_path: float) -> None:
        super().__init__()
        self.F, self.G = AttentionHalf(width, attention), MlpHalf(channels)
        self.res_proj = nn.Linear(width, channels)
        self.drop_path = DropPath(drop_path)

    @checkpointed
    def forward(self, x: Tensor, grid: Size) -> Tensor:
        """(B, tokens, 2 C) -> (B, fewer tokens, 2 C'), with two equal streams."""
        first, second = x.chunk(2, dim=-1)
        x = (first + second) / 2
        skip = self.F.attn.pooled_skip(self.res_proj(x), grid)
        x = skip + self.F(x, grid)
        x = self.drop_path(x + self.G(x))
        return torch.cat((x, x), dim=-1)

    def pooled(self, grid: Size) -> Size:
        """The grid of what it returns."""
        stride = cast("nn.Conv3d", self.F.attn.pool_q).stride
        return cast("Size", tuple(-(-side // step) for side, step in zip(grid, stride, strict=True)))


@residual_branches.register
def _(block: ReversibleBlock) -> tuple[Branch, ...]:
    return (
        Branch("attention", ReversibleBlock.attend, cut=by_samples(inner_states=9), last="F.attn.proj"),
        Branch("mlp", ReversibleBlock.transform, cut=by_tokens(inner_states=13), last="G.mlp.fc2"),
    )


@stream_axis.register
def _(block: ReversibleBlock) -> int:
    return -1


@why_not_residual.register
def _(block: TransitionBlock) -> str:
    return "it changes width and resolution (downsampling)"


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
