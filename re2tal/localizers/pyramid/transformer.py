"""ActionFormer's transformer block (Zhang et al., ECCV 2022, section 3.2).

    x = pool(x) + scale * attention(norm(x));  x = x + scale * mlp(norm(x))        padding is zero in and out

Convolutions make the queries, keys and values. A block of stride 2 halves the sequence: its convolutions have stride
2, and its skip is a max pool.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from re2tal.localizers.masked import AffineDropPath, ChannelNorm, Conv, blank


class TransformerBlock(nn.Module):
    """Pre-norm attention and MLP over (B, C, T), optionally halving T."""

    def __init__(
        self, channels: int, *, num_heads: int, stride: int, window: int | None, dropout: float, path_drop: float
    ) -> None:
        super().__init__()
        self.stride = stride
        self.attention_norm = ChannelNorm(channels)
        self.attention = ConvAttention(channels, num_heads=num_heads, stride=stride, window=window, dropout=dropout)
        self.attention_path = AffineDropPath(channels, drop=path_drop)
        # The skip is halved as the attention is, which reads three steps around every second one.
        self.pool = nn.MaxPool1d(3, stride=stride, padding=1) if stride > 1 else nn.Identity()
        self.mlp_norm = ChannelNorm(channels)
        self.mlp = nn.Sequential(
            Conv(channels, 4 * channels, 1),
            nn.GELU(),
            nn.Dropout(dropout),
            Conv(4 * channels, channels, 1),
            nn.Dropout(dropout),
        )
        self.mlp_path = AffineDropPath(channels, drop=path_drop)
        for module in self.modules():
            if isinstance(module, nn.Conv1d) and module.bias is not None:
                # As ActionFormer begins; PyTorch would draw them.
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, T), (B, T) -> the same with T / stride steps."""
        # From the mask before it is halved, which the attention does by itself.
        attended = self.attention_path(self.attention(self.attention_norm(x), mask))
        mask = mask[:, :: self.stride]
        x = blank(self.pool(x), mask) + attended
        return x + self.mlp_path(blank(self.mlp(self.mlp_norm(x)), mask)), mask


class ConvProjection(nn.Module):
    """Depthwise convolution, norm, linear map: what makes the queries, the keys or the values."""

    def __init__(self, channels: int, *, stride: int) -> None:
        super().__init__()
        self.conv = Conv(channels, channels, 3, stride=stride, padding=1, groups=channels, bias=False)
        self.norm = ChannelNorm(channels)
        self.linear = Conv(channels, channels, 1)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """(B, C, T) and the mask of its output, (B, T / stride) -> (B, C, T / stride)."""
        return self.linear(self.norm(blank(self.conv(x), mask)))


class ConvAttention(nn.Module):
    """Multi-head attention among the real steps, to all of them or within a window centred on the query."""

    def __init__(self, channels: int, *, num_heads: int, stride: int, window: int | None, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.stride = stride
        self.window = window
        self.query = ConvProjection(channels, stride=stride)
        self.key = ConvProjection(channels, stride=stride)
        self.value = ConvProjection(channels, stride=stride)
        self.output = Conv(channels, channels, 1)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """(B, C, T), (B, T) -> (B, C, T / stride), zero in the padding."""
        mask = mask[:, :: self.stride]
        query, key, value = (
            project(x, mask).unflatten(1, (self.num_heads, -1)).transpose(2, 3)
            for project in (self.query, self.key, self.value)
        )
        if self.window is None:
            attended = attend_globally(query, key, value, mask)
        else:
            attended = attend_locally(query, key, value, mask, reach=self.window // 2)
        return blank(self.dropout(self.output(attended.transpose(1, 2).flatten(2).transpose(1, 2))), mask)


def attend_globally(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Attention to all real steps: three of (B, heads, T, channels) and (B, T) -> (B, heads, T, channels)."""
    # A clip without any real step attends to its padding, because a softmax over nothing is NaN; it is blanked later.
    keys = mask | ~mask.any(dim=1, keepdim=True)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=keys[:, None, None])


def attend_locally(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, *, reach: int) -> Tensor:
    """Attention to the real steps at most `reach` away; shapes as `attend_globally`; memory is linear in T.

    Queries are cut into N blocks of 2 * reach; the keys of a block are those of its span, `reach` wider on each side.
    """
    num_heads, num_steps, block = query.shape[1], query.shape[2], 2 * reach
    # The last block is filled up; what it attends for nothing is cut off at the end.
    tail, span = -num_steps % block, block + 2 * reach
    query = F.pad(query, (0, 0, 0, tail)).unflatten(2, (-1, block)).flatten(1, 2)
    key, value = (
        F.pad(x, (0, 0, reach, reach + tail)).unfold(2, span, block).transpose(-1, -2).flatten(1, 2)
        for x in (key, value)
    )
    real = F.pad(mask, (reach, reach + tail)).unfold(1, span, block)
    distance = torch.arange(span, device=mask.device) - reach - torch.arange(block, device=mask.device)[:, None]
    # A step may attend to itself even in the padding, where it may have no real key: a softmax over nothing is NaN.
    allowed = (distance.abs() <= reach) & (real[:, :, None] | (distance == 0))
    # Heads and blocks are one axis here, so that each block's mask stands once for every head.
    attended = F.scaled_dot_product_attention(query, key, value, attn_mask=allowed.repeat(1, num_heads, 1, 1))
    return attended.unflatten(1, (num_heads, -1)).flatten(2, 3)[:, :, :num_steps]
