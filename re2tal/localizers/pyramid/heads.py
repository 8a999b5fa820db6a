"""The heads of an anchor-free localizer: the same convolutions slide over every level of the pyramid."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from re2tal.localizers.masked import MaskedConv
from re2tal.structures import Pyramid


class Head(nn.Module):
    """Hidden convolutions and one that predicts; `bias` is what it predicts before training, but for noise."""

    def __init__(
        self,
        channels: int,
        *,
        convs: Sequence[Callable[[int, int], MaskedConv]],
        out_channels: int,
        bias: float = 0.0,
    ) -> None:
        super().__init__()
        self.convs = nn.ModuleList(conv(channels, channels) for conv in convs)
        self.output = nn.Conv1d(channels, out_channels, 3, padding=1)
        assert self.output.bias is not None
        nn.init.constant_(self.output.bias, bias)

    def forward(self, pyramid: Pyramid) -> list[Tensor]:
        """L levels (B, C, T_l) -> L predictions (B, out_channels, T_l)."""
        return [self._predict(x, mask) for x, mask in zip(pyramid.levels, pyramid.masks, strict=True)]

    def _predict(self, x: Tensor, mask: Tensor) -> Tensor:
        for conv in self.convs:
            x = conv(x, mask)
        return self.output(x)


class RegressionHead(Head):
    """Distances to the start and the end, in strides: not negative, each level with a learned scale."""

    def __init__(self, channels: int, *, convs: Sequence[Callable[[int, int], MaskedConv]], num_levels: int) -> None:
        super().__init__(channels, convs=convs, out_channels=2)
        self.scales = nn.ModuleList(Scale() for _ in range(num_levels))

    def forward(self, pyramid: Pyramid) -> list[Tensor]:
        """L levels (B, C, T_l) -> L predictions (B, 2, T_l)."""
        return [torch.relu(scale(x)) for scale, x in zip(self.scales, super().forward(pyramid), strict=True)]


class Scale(nn.Module):
    """One learned factor, initially 1."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))  # not (): DeepSpeed cannot broadcast a parameter without dimensions

    def forward(self, x: Tensor) -> Tensor:
        """x, of any shape, times the factor."""
        return self.scale * x
