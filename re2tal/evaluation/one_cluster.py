"""Soft-NMS of one cluster of overlapping segments: all penalties first, then one subtraction a pick.

In the order of starts, the segments that may overlap with one stand in one stretch:

    row i of `penalties`, between `first[i]` and `last[i]`, is what to subtract when i is picked
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]
Penalty = Callable[[Floats, Floats], Floats]
"""(rows, n) IoU with the pick of each row and (rows, 1) length of that pick -> what to subtract from log scores."""


@dataclass(frozen=True)
class Cluster:
    """N segments, by their starts."""

    penalties: Floats
    """(N, N) float32: row i is subtracted when i is picked"""
    first: list[int]
    last: list[int]

    @classmethod
    def of(cls, starts: Floats, ends: Floats, lengths: Floats, penalty: Penalty) -> Cluster:
        """`starts` (N,) must not decrease."""
        num = len(starts)
        last = np.maximum(np.searchsorted(starts, ends, side="left"), np.arange(num) + 1)
        first = np.minimum(np.searchsorted(np.maximum.accumulate(ends), starts, side="right"), np.arange(num))
        counts = last - np.arange(num) - 1
        one = np.repeat(np.arange(num), counts)
        other = np.arange(len(one)) - np.repeat(np.cumsum(counts) - counts, counts) + one + 1
        overlap = np.minimum(ends[one], ends[other]) - starts[other]
        np.maximum(overlap, 0, out=overlap)
        iou = (overlap / (lengths[one] + lengths[other] - overlap))[None]
        penalties = np.zeros((num, num), dtype=np.float32)
        penalties[other, one] = penalty(iou.copy(), lengths[other][None])[0]
        penalties[one, other] = penalty(iou, lengths[one][None])[0]
        return cls(penalties, first.tolist(), last.tolist())

    def pick(self, logs: Floats, *, log_min: float, max_picks: int) -> tuple[NDArray[np.int64], Floats, int]:
        """(N,) log scores -> the picks in their order, their lowered log scores, and how many more reach it."""
        logs = logs.astype(np.float64)
        picks: list[int] = []
        values: list[float] = []
        for _ in range(min(max_picks, len(logs))):
            best = int(logs.argmax())
            value = logs.item(best)
            if value < log_min and picks:
                break
            picks.append(best)
            values.append(value)
            first, last = self.first[best], self.last[best]
            logs[first:last] -= self.penalties[best, first:last]
            logs[best] = -np.inf
        return np.array(picks, dtype=np.int64), np.array(values), int((logs >= log_min).sum())
