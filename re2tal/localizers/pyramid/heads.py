"""The heads of an anchor-free localizer: the same convolutions slide over every level of the pyramid."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from re2tal.localizers.masked import Conv, MaskedConv
from re2tal.structures import Pyramid


class Head(nn.Module):
    """Hidden convolutions and one that predicts; `bias` is what it predicts before training, but for noise.

    `channels` come out of the hidden convolutions.
    """

    def __init__(
        self,
        channels: int,
        *,
        convs: Sequence[MaskedConv],
        out_channels: int,
        kernel_size: int = 3,
        bias: float = 0.0,
    ) -> None:
        super().__init__()
        self.convs = nn.ModuleList(convs)
        self.output = Conv(channels, out_channels, kernel_size, padding=kernel_size // 2)
        # For the type checker: Conv1d has a bias unless told otherwise.
        assert self.output.bias is not None
        nn.init.constant_(self.output.bias, bias)

    def forward(self, pyramid: Pyramid) -> Tensor:
        """L levels (B, C, T_l) -> predictions at the P points of all levels, (B, P, out_channels)."""
        return torch.cat(self.levels(pyramid), dim=2).transpose(1, 2)

    def levels(self, pyramid: Pyramid) -> list[Tensor]:
        """As `forward`, level by level: (B, out_channels, T_l)."""
        return [self._predict(x, mask) for x, mask in zip(pyramid.levels, pyramid.masks, strict=True)]

    def _predict(self, x: Tensor, mask: Tensor) -> Tensor:
        for conv in self.convs:
            x = conv(x, mask)
        return self.output(x)


class RegressionHead(Head):
    """Numbers that are not negative, such as distances to the start and the end in strides; each level has a learned
    scale."""

    def __init__(
        self,
        channels: int,
        *,
        convs: Sequence[MaskedConv],
        num_levels: int,
        out_channels: int = 2,
        kernel_size: int = 3,
    ) -> None:
        super().__init__(channels, convs=convs, out_channels=out_channels, kernel_size=kernel_size)
        self.scales = nn.ModuleList(Scale() for _ in range(num_levels))

    def levels(self, pyramid: Pyramid) -> list[Tensor]:
        """Level by level: (B, out_channels, T_l)."""
        return [torch.relu(scale(x)) for scale, x in zip(self.scales, super().levels(pyramid), strict=True)]


class Scale(nn.Module):
    """One learned factor, initially 1."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))  # not (): DeepSpeed cannot broadcast a parameter without dimensions

    def forward(self, x: Tensor) -> Tensor:
        """x, of any shape, times the factor."""
        return self.scale * x
