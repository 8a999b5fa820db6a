"""AdaTAD's temporal-informative adapter (Liu et al., CVPR 2024): a bottleneck that convolves over the whole window.

    z = GELU(down(x));   F(x) = gamma * up(z + conv(dwconv(z)))        x = x + F(x), the last branch of a block

`dwconv` has three taps over time, for every position of a picture by itself. Its time is that of the window, so it is
the one thing in a clip-wise backbone that crosses clips; only before the first and after the last clip are there zeros.
A new adapter returns zero: the first forward is that of the frozen backbone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from re2tal.reversible.chunking import even_spans
from re2tal.rewire import Cut, Part

TAPS = 3


class TemporalAdapter(nn.Module):
    """What is added to the tokens of all clips of some videos; its parameters have the names of OpenTAD's."""

    def __init__(self, channels: int, *, hidden: int, steps: int) -> None:
        """`hidden` is the inner width, `steps` the number of time steps in the tokens of one clip."""
        super().__init__()
        self.steps = steps
        self.down_proj = nn.Linear(channels, hidden)
        self.dwconv = nn.Conv1d(hidden, hidden, TAPS, padding=TAPS // 2, groups=hidden)
        self.conv = nn.Conv1d(hidden, hidden, 1)
        self.up_proj = nn.Linear(hidden, channels)
        self.gamma = nn.Parameter(torch.ones(1))
        nn.init.trunc_normal_(self.down_proj.weight, std=0.02)
        nn.init.normal_(self.dwconv.weight, std=math.sqrt(2 / TAPS))
        nn.init.normal_(self.conv.weight, std=math.sqrt(2 / hidden))
        nn.init.zeros_(self.up_proj.weight)
        for layer in (self.down_proj, self.dwconv, self.conv, self.up_proj):
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, *, clips_per_video: int) -> Tensor:
        """(B * clips, steps * positions, C) -> the same shape. Positions may be any part of a picture."""
        z = F.gelu(self.down_proj(x))
        # (B, clips, steps, positions, hidden): time is clips and steps together.
        grid = z.unflatten(1, (self.steps, -1)).unflatten(0, (-1, clips_per_video))
        series = grid.permute(0, 3, 4, 1, 2)
        mixed = self.conv(self.dwconv(series.flatten(3).flatten(0, 1)))
        mixed = mixed.unflatten(0, series.shape[:2]).unflatten(3, series.shape[3:]).permute(0, 3, 4, 1, 2)
        return self.gamma * self.up_proj(z + mixed.reshape(z.shape))


def by_positions(inner_states: float) -> Cut:
    """Cuts tokens by their position in the picture: pieces of clips would end its time at their borders.

    `block.adapter` says how many steps the tokens of a clip hold, each with all positions in the same order.
    """

    def parts(block: nn.Module, shape: torch.Size, num: int) -> Sequence[Part]:
        steps = int(block.adapter.steps)  # type: ignore[union-attr, arg-type]
        positions = shape[1] // steps
        return [
            Part(1, tuple((step * positions + start, step * positions + stop) for step in range(steps)))
            for start, stop in even_spans(positions, num)
        ]

    return Cut(parts, lambda block, shape: inner_states)
