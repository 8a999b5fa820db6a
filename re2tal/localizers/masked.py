"""Layers over (B, C, T) sequences of which only some steps are real; masks are (B, T), True where a step is real.

A convolution mixes neighbours, so whatever lies in the padding leaks into the last real steps. Each layer says what it
leaves there.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def blank(x: Tensor, mask: Tensor) -> Tensor:
    """(B, C, T) with the steps that are not real set to zero."""
    # In one pass, where `masked_fill` first copies, forward and backward. A product would keep NaN.
    return torch.where(mask[:, None], x, 0.0)


class Conv(nn.Conv1d):
    """`nn.Conv1d` that reads (B, C, T) as it lies in memory.

    Norms leave the channels of a step side by side. `nn.Conv1d` copies that to steps side by side, forward and
    backward, and the next norm copies it back.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T) -> (B, out_channels, steps as of `nn.Conv1d`)."""
        if isinstance(self.padding, str) or self.padding_mode != "zeros":
            return super().forward(x)
        plain = (self.kernel_size, self.stride, self.padding, self.groups) == ((1,), (1,), (0,), 1)
        if plain:
            return F.linear(x.transpose(1, 2), self.weight[..., 0], self.bias).transpose(1, 2)
        stride, padding, dilation = (1, *self.stride), (0, *self.padding), (1, *self.dilation)
        y = F.conv2d(x[:, :, None], self.weight[:, :, None], self.bias, stride, padding, dilation, self.groups)
        return y[:, :, 0]


class ChannelNorm(nn.LayerNorm):
    """Layer normalisation over the channels of each step: (B, C, T) -> (B, C, T)."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T) -> (B, C, T)."""
        # nn.LayerNorm normalises the last axes.
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class MaskedConv(nn.Module):
    """Convolution, blank the padding, normalise, ReLU, and (if `mask_after_norm`) blank the padding once more.

    Without the second blanking the padding holds ReLU(norm bias), which the next convolution reads: the original
    ActionFormer does so, OpenTAD does not.
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, kernel_size: int, norm_eps: float, mask_after_norm: bool
    ) -> None:
        super().__init__()
        # No bias where a norm follows, as in the public implementations.
        self.conv = Conv(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
        self.norm = ChannelNorm(out_channels, eps=norm_eps)
        self.mask_after_norm = mask_after_norm

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """(B, in_channels, T), (B, T) -> (B, out_channels, T)."""
        x = torch.relu(self.norm(blank(self.conv(x), mask)))
        return blank(x, mask) if self.mask_after_norm else x


class AffineDropPath(nn.Module):
    """A residual branch's learned scale per channel, and stochastic depth: whole clips skip the branch in training."""

    def __init__(self, channels: int, *, drop: float) -> None:
        super().__init__()
        # As ActionFormer begins: a block is nearly the identity.
        self.scale = nn.Parameter(torch.full((channels,), 1e-4))
        self.drop = drop

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T) -> (B, C, T), for a fraction `drop` of the clips zero."""
        x = self.scale[:, None] * x
        if not self.training or self.drop == 0.0:
            return x
        keep = 1.0 - self.drop
        # What stays is scaled up, so that the mean over draws is what evaluation computes.
        return x * (torch.rand(len(x), 1, 1, device=x.device) < keep).to(x.dtype) / keep
