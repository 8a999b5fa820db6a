"""Soft-NMS (Bodla et al., ICCV 2017) of segments in time, for all classes at once.

    repeat: take the best segment p; for every other one of its group: score *= decay(IoU with p)

A group is a class. Groups whose segments overlap with few others, and a few large groups, are picked by their pairs
(`re2tal.evaluation.overlaps`). Other groups advance together: one row per group, one pick per row and round, so a round
is a dozen vector operations whatever their number. Scores are kept as logarithms, where decay is a subtraction and
"gone" is minus infinity. Lengths are 1e-6 larger than they are, as in the compiled extensions that others use.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from re2tal.evaluation.overlaps import Floats, Indices, Penalty, padded_lengths, pick_in_rounds, pick_one_by_one, reach

ROUNDS_BETWEEN_COMPACTIONS = 32
MAX_OVERLAPS_IN_ROUNDS = 12
"""Of a segment of a group with others behind it, on average. Measured: with as many, one by one is as fast."""
MAX_ONE_BY_ONE = 3
"""Fewer groups than a round is cheaper than: measured, a pick costs 2 us, a round 12 us."""
MAX_OVERLAPS_ONE_BY_ONE = 250
"""As above, for each pick: a pair costs 15 ns beforehand, and 10 bytes."""


def soft_nms(
    segments: Floats, scores: Floats, groups: NDArray, *, penalty: Penalty, min_score: float, max_per_group: int
) -> tuple[Indices, Floats, int]:
    """Suppression within each group of N segments: indices of what stays, and its lowered scores, float32.

    `segments` (N, 2) float32, `scores` (N,), `groups` (N,) any integers. A group ends when `max_per_group` are picked
    or no lowered score is at least `min_score`; its first pick always counts. The third value
    is how many more had a score of at least `min_score` when their group ended, so that the limit left out so many at
    most.
    """
    if len(scores) == 0:
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.float32), 0
    # By the same function as the scores: another one may differ in the last bit, and a score may equal `min_score`.
    log_min = float(_logs(np.array([min_score]))[0]) if min_score > 0 else np.finfo(np.float64).min
    # Numbered without gaps, as bincount below makes one cell for each number up to the largest.
    _, groups = np.unique(groups, return_inverse=True)
    index, logs, num_left = _picks(segments, _logs(scores), groups, penalty, log_min, max_per_group)
    stays = logs >= log_min
    # Sorting is needed only where a group has to be cut, or has no pick above the minimum and keeps its best.
    picks = np.bincount(groups[index], weights=stays)
    if picks.min() == 0 or picks.max() > max_per_group:
        # By group, then by falling score, then by number.
        order = np.lexsort((index, -logs, groups[index]))
        index, logs = index[order], logs[order]
        of_group = groups[index]
        # Place in the group: searchsorted gives where the group begins.
        rank = np.arange(len(index)) - np.searchsorted(of_group, of_group)
        counts = (logs >= log_min) | (rank == 0)
        stays = counts & (rank < max_per_group)
        num_left += int(counts.sum() - stays.sum())
    return index[stays], np.exp(logs[stays]).astype(np.float32), num_left


def _picks(
    segments: Floats, logs: Floats, groups: NDArray, penalty: Penalty, log_min: float, max_per_group: int
) -> tuple[Indices, Floats, int]:
    """Numbers and log scores of at least all that may be picked, in any order; how many more reach `log_min`."""
    everything = np.arange(len(logs))
    if not penalty.is_local:
        # Hard suppression from an IoU of 0 on: segments that do not overlap suppress each other, so pairs do not
        # suffice.
        return _pick_in_table(segments, logs, groups, everything, penalty, log_min, max_per_group)
    order = np.lexsort((segments[:, 0], groups))
    sorted_groups = groups[order]
    last = reach(segments[order], sorted_groups)
    sizes = np.bincount(groups)
    overlaps = np.bincount(sorted_groups, weights=last - everything - 1)
    # On average over the group's segments: those that start behind it and before its end.
    is_sparse = overlaps <= MAX_OVERLAPS_IN_ROUNDS * sizes
    in_rounds = is_sparse[sorted_groups]
    # `last` counts among all segments; the running sum turns it into a place among those that go in rounds.
    some, reaching = order[in_rounds], np.cumsum(in_rounds)[last[in_rounds] - 1]
    parts: list[tuple[Indices, Floats, int]] = [(some, logs[some], 0)]
    if len(some):
        values = pick_in_rounds(segments[some], logs[some], reaching, some, penalty=penalty, log_min=log_min)
        parts = [(some, values, 0)]
    dense = np.flatnonzero(~is_sparse)
    few_overlaps = overlaps[dense] <= MAX_OVERLAPS_ONE_BY_ONE * np.minimum(sizes[dense], max_per_group)
    if len(dense) > MAX_ONE_BY_ONE or not few_overlaps.all():
        rest = order[~in_rounds]
        parts.append(_pick_in_table(segments, logs, groups, rest, penalty, log_min, max_per_group))
    else:
        for group in dense:
            begin, end = np.searchsorted(sorted_groups, [group, group + 1])
            some, reaching = order[begin:end], last[begin:end] - begin
            picks, values, num_left = pick_one_by_one(
                segments[some], logs[some], reaching, some, penalty=penalty, log_min=log_min, max_picks=max_per_group
            )
            parts.append((some[picks], values, num_left))
    index, values = (np.concatenate([part[column] for part in parts]) for column in (0, 1))
    return index, values, sum(part[2] for part in parts)


def _pick_in_table(
    segments: Floats,
    logs: Floats,
    groups: NDArray,
    chosen: Indices,
    penalty: Penalty,
    log_min: float,
    max_per_group: int,
) -> tuple[Indices, Floats, int]:
    """As `_picks`, of the `chosen` segments; each group's first is there, whatever its score."""
    chosen = np.sort(chosen)  # of equals the first is picked
    rows = _Rows.of(segments[chosen], logs[chosen], groups[chosen])
    num_rows = len(rows.logs)
    picks: list[tuple[Indices, Floats]] = []
    while len(picks) < max_per_group and rows.logs.size:
        # Not more than the longest row holds: from then on, picks would be of what is gone.
        rounds = min(ROUNDS_BETWEEN_COMPACTIONS, max_per_group - len(picks), rows.logs.shape[1])
        picks += [rows.pick(penalty) for _ in range(rounds)]
        rows = rows.compacted(log_min)
    index, values = (np.concatenate(column) for column in zip(*picks, strict=True))
    stays = values >= log_min
    # The first round picked one of every group, in the order of rows; short groups went on to pick what is gone, at
    # -inf.
    stays[:num_rows] = True
    return chosen[index[stays]], values[stays], int((rows.logs >= log_min).sum())


def _logs(scores: Floats) -> Floats:
    # A score of zero is the smallest positive one: it is still there, and -inf would say that it is gone.
    return np.log(np.maximum(scores.astype(np.float64), np.finfo(np.float64).tiny))


@dataclass
class _Rows:
    """The remaining segments of each group, one group a row; log scores of what is gone or never was are -inf."""

    starts: Floats
    ends: Floats
    lengths: Floats
    logs: Floats
    index: Indices

    def __post_init__(self) -> None:
        num_rows, width = self.logs.shape
        self.first = np.arange(num_rows) * width
        # For every round anew; each would otherwise allocate two arrays of this size.
        self.overlap, self.union = np.empty_like(self.starts), np.empty_like(self.starts)

    @classmethod
    def of(cls, segments: Floats, logs: Floats, groups: NDArray) -> _Rows:
        _, group, counts = np.unique(groups, return_inverse=True, return_counts=True)
        order = np.argsort(group, kind="stable")
        row = group[order]
        place = row, np.arange(len(order)) - (np.cumsum(counts) - counts)[row]

        def spread(values: NDArray, blank: float) -> NDArray:
            rows = np.full((len(counts), counts.max()), blank, dtype=values.dtype)
            rows[place] = values[order]
            return rows

        starts, ends = segments[:, 0], segments[:, 1]
        return cls(
            spread(starts, 0.0),
            spread(ends, 0.0),
            # 1, not 0, where there is no segment: a union of 0 would divide.
            spread(padded_lengths(starts, ends), 1.0),
            spread(logs, -np.inf),
            spread(np.arange(len(logs)), 0),
        )

    def compacted(self, log_min: float) -> _Rows:
        """Without the rows and columns in which nothing is left that could still be picked."""
        alive = self.logs >= log_min
        rows = alive.any(axis=1)
        width = alive.sum(axis=1).max(initial=0)
        # Copying pays only if a good part has gone.
        if rows.sum() * width > 0.9 * alive.size:
            return self
        # One row need not be sorted.
        if len(alive) == 1:
            columns = np.flatnonzero(alive[0])
            return _Rows(*(x.take(columns, axis=1) for x in self._arrays()))
        alive = alive[rows]
        # Those that are left come first, in their old order, on which ties depend.
        order = np.argsort(~alive, axis=1, kind="stable")[:, :width]
        compact = _Rows(*(np.take_along_axis(x[rows], order, axis=1) for x in self._arrays()))
        # A row with fewer than the widest is filled up with what cannot be picked any more; it must not come back.
        compact.logs[~np.take_along_axis(alive, order, axis=1)] = -np.inf
        return compact

    def _arrays(self) -> tuple[NDArray, ...]:
        return self.starts, self.ends, self.lengths, self.logs, self.index

    def pick(self, penalty: Penalty) -> tuple[Indices, Floats]:
        """Take the best segment of each row out and lower the others; its index and log score, one per row."""
        best = self.logs.argmax(axis=1)
        # As numbers in the flat array, which take and put are fastest with.
        best += self.first
        picked = self.index.take(best), self.logs.take(best)
        # Before the penalties: minus infinity stays what it is, whatever is subtracted.
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
        self.logs -= penalty.of(overlap, length)
        return picked
