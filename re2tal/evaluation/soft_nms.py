"""Soft-NMS (Bodla et al., ICCV 2017) of segments in time, for all classes at once.

    repeat: take the best segment p; for every other one of its group: score *= decay(IoU with p)

All groups, that is classes, advance together: one row per group, one pick per row and round, so a round is a dozen
vector operations whatever the number of groups. Scores are kept as logarithms, where decay is a subtraction and "gone"
is minus infinity. Lengths are 1e-6 larger than they are, as in the compiled extensions that others use.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]
Penalty = Callable[[Floats, Floats], Floats]
"""(rows, n) IoU with the pick of each row and (rows, 1) length of that pick -> what to subtract from log scores."""

LENGTH_EPSILON = np.float32(1e-6)
ROUNDS_BETWEEN_COMPACTIONS = 32


def soft_nms(
    segments: Floats,
    scores: Floats,
    groups: NDArray,
    *,
    penalty: Penalty,
    min_score: float,
    max_per_group: int,
) -> tuple[NDArray[np.int64], Floats]:
    """Suppression within each group of N segments: indices of what stays, and its lowered scores, float32.

    `segments` (N, 2) float32, `scores` (N,), `groups` (N,) any integers. A group ends when `max_per_group` are picked
    or no lowered score is at least `min_score`; its first pick always counts.
    """
    if len(scores) == 0:
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.float32)
    log_min = math.log(min_score) if min_score > 0 else np.finfo(np.float64).min
    rows = _Rows.of(segments, scores, groups)
    num_groups = len(rows.logs)
    picks: list[tuple[NDArray[np.int64], Floats]] = []
    while len(picks) < max_per_group and rows.logs.size:
        rounds = min(ROUNDS_BETWEEN_COMPACTIONS, max_per_group - len(picks), rows.logs.shape[1])
        picks += [rows.pick(penalty) for _ in range(rounds)]
        rows = rows.compacted(log_min)
    index, logs = (np.concatenate(column) for column in zip(*picks, strict=True))
    stays = logs >= log_min
    stays[:num_groups] = True
    return index[stays], np.exp(logs[stays]).astype(np.float32)


@dataclass
class _Rows:
    """The remaining segments of each group, one group a row; log scores of what is gone or never was are -inf."""

    starts: Floats
    ends: Floats
    lengths: Floats
    logs: Floats
    index: NDArray[np.int64]

    def __post_init__(self) -> None:
        num_rows, width = self.logs.shape
        self.first = np.arange(num_rows) * width
        self.overlap, self.union = np.empty_like(self.starts), np.empty_like(self.starts)

    @classmethod
    def of(cls, segments: Floats, scores: Floats, groups: NDArray) -> _Rows:
        _, group, counts = np.unique(groups, return_inverse=True, return_counts=True)
        order = np.argsort(group, kind="stable")
        row = group[order]
        place = row, np.arange(len(order)) - (np.cumsum(counts) - counts)[row]

        def spread(values: NDArray, blank: float) -> NDArray:
            rows = np.full((len(counts), counts.max()), blank, dtype=values.dtype)
            rows[place] = values[order]
            return rows

        starts, ends = segments[:, 0], segments[:, 1]
        # A score of zero is the smallest positive one: it is still there, and -inf would say that it is gone.
        logs = np.log(np.maximum(scores.astype(np.float64), np.finfo(np.float64).tiny))
        return cls(
            spread(starts, 0.0),
            spread(ends, 0.0),
            spread(ends - starts + LENGTH_EPSILON, 1.0),
            spread(logs, -np.inf),
            spread(np.arange(len(scores)), 0),
        )

    def compacted(self, log_min: float) -> _Rows:
        """Without the rows and columns in which nothing is left that could still be picked."""
        alive = self.logs >= log_min
        rows = alive.any(axis=1)
        width = alive.sum(axis=1).max(initial=0)
        if rows.sum() * width > 0.9 * alive.size:
            return self
        if len(alive) == 1:
            columns = np.flatnonzero(alive[0])
            return _Rows(*(x.take(columns, axis=1) for x in self._arrays()))
        alive = alive[rows]
        order = np.argsort(~alive, axis=1, kind="stable")[:, :width]
        compact = _Rows(*(np.take_along_axis(x[rows], order, axis=1) for x in self._arrays()))
        compact.logs[~np.take_along_axis(alive, order, axis=1)] = -np.inf
        return compact

    def _arrays(self) -> tuple[NDArray, ...]:
        return self.starts, self.ends, self.lengths, self.logs, self.index

    def pick(self, penalty: Penalty) -> tuple[NDArray[np.int64], Floats]:
        """Take the best segment of each row out and lower the others; its index and log score, one per row."""
        best = self.logs.argmax(axis=1)
        best += self.first
        picked = self.index.take(best), self.logs.take(best)
        self.logs.put(best, -np.inf)
        start, end, length = (x.take(best)[:, None] for x in (self.starts, self.ends, self.lengths))
        overlap, union = self.overlap, self.union
        np.maximum(self.starts, start, out=union)
        np.minimum(self.ends, end, out=overlap)
        overlap -= union
        np.maximum(overlap, 0, out=overlap)
        np.add(self.lengths, length, out=union)
        union -= overlap
        overlap /= union
        self.logs -= penalty(overlap, length)
        return picked
