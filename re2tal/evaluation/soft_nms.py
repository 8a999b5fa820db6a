"""Soft-NMS (Bodla et al., ICCV 2017) of segments in time, for all classes at once.

    repeat: take the best segment p; for every other one of its group: score *= decay(IoU with p)

Segments that no chain of overlaps connects do not lower each other, so a group, that is a class, falls into clusters.
Clusters of about one size advance together: one row per cluster, one pick per row and round, so a round is a dozen
vector operations whatever their number. A few large clusters are cheaper one by one, with all penalties computed
beforehand (`re2tal.evaluation.one_cluster`). Scores are kept as logarithms, where decay is a subtraction and "gone" is
minus infinity. Lengths are 1e-6 larger than they are, as in the compiled extensions that others use.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from re2tal.evaluation.one_cluster import Cluster, Floats, Penalty

LENGTH_EPSILON = np.float32(1e-6)
ROUNDS_BETWEEN_COMPACTIONS = 32
MAX_OVERLAID = 2.5
"""Of a group, for clusters to be worth looking for."""
MAX_ONE_BY_ONE = 3
"""Fewer clusters than a round is cheaper than: measured, a pick costs 3 us, a round 12 us."""
MAX_SIZE_ONE_BY_ONE = 4096
"""Their penalties take 64 MiB."""


def soft_nms(
    segments: Floats,
    scores: Floats,
    groups: NDArray,
    *,
    penalty: Penalty,
    min_score: float,
    max_per_group: int,
) -> tuple[NDArray[np.int64], Floats, int]:
    """Suppression within each group of N segments: indices of what stays, and its lowered scores, float32.

    `segments` (N, 2) float32, `scores` (N,), `groups` (N,) any integers. A group ends when `max_per_group` are picked
    or no lowered score is at least `min_score`; its first pick always counts. The third value is how many more had a
    score of at least `min_score` when their group ended, so that the limit left out so many at most.
    """
    if len(scores) == 0:
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.float32), 0
    log_min = math.log(min_score) if min_score > 0 else np.finfo(np.float64).min
    _, groups = np.unique(groups, return_inverse=True)
    limits = penalty, log_min, max_per_group
    everything = np.arange(len(scores))
    tables = [(everything, groups)]
    if _is_local(penalty) and not _is_dense(segments, groups):
        tables = _cheapest(groups, find_clusters(segments, groups), max_picks=max_per_group)
    picks = [_pick_all(segments, scores, rows, row_of, *limits) for rows, row_of in tables]
    index, logs = (np.concatenate([pick[column] for pick in picks]) for column in (0, 1))
    num_left = sum(pick[2] for pick in picks)
    if tables[0][1] is not groups:
        index, logs, num_more = _best_of_groups(index, logs, groups, log_min, max_per_group)
        num_left += num_more
    return index, np.exp(logs).astype(np.float32), num_left


def _best_of_groups(
    index: NDArray[np.int64], logs: Floats, groups: NDArray, log_min: float, max_per_group: int
) -> tuple[NDArray[np.int64], Floats, int]:
    """Those picks of clusters that are picks of their groups, and how many others only the limit leaves out.

    Picks of a group come by falling score, so its first ones are the best of all its clusters.
    """
    order = np.lexsort((index, -logs, groups[index]))
    index, logs = index[order], logs[order]
    of_group = groups[index]
    rank = np.arange(len(index)) - np.searchsorted(of_group, of_group)
    counts = (logs >= log_min) | (rank == 0)
    stays = counts & (rank < max_per_group)
    return index[stays], logs[stays], int(counts.sum() - stays.sum())


def _is_local(penalty: Penalty) -> bool:
    """False where segments that do not overlap lower each other, as with a threshold of 0."""
    return penalty(np.zeros((1, 1), dtype=np.float32), np.ones((1, 1), dtype=np.float32)).item() == 0


def _is_dense(segments: Floats, groups: NDArray) -> bool:
    """Whether nearly all of a group is one cluster, so that looking for them is lost time."""
    span = float(segments[:, 1].max() - segments[:, 0].min())
    covered = float(np.maximum(segments[:, 1] - segments[:, 0], 0).sum())
    # Where r segments lie over each other on average, a cluster has about exp(r) of them.
    return covered > MAX_OVERLAID * (int(groups.max()) + 1) * span


def find_clusters(segments: Floats, groups: NDArray) -> NDArray[np.int64]:
    """(N, 2) segments and (N,) numbers of groups -> (N,) numbers of clusters: what a chain of overlaps connects."""
    starts, ends = segments[:, 0], segments[:, 1]
    order = np.lexsort((starts, groups))
    by_end = np.argsort(ends, kind="stable")
    rank = np.empty(len(ends), dtype=np.int64)
    rank[by_end] = np.arange(len(ends))
    # The latest end so far in each group: a group's ranks are above those of the groups before it.
    above = groups[order].astype(np.int64) * len(ends)
    latest = ends[by_end[np.maximum.accumulate(rank[order] + above) - above]]
    begins = np.ones(len(order), dtype=bool)
    begins[1:] = (np.diff(groups[order]) != 0) | (starts[order][1:] >= latest[:-1])
    clusters = np.empty(len(order), dtype=np.int64)
    clusters[order] = np.cumsum(begins) - 1
    return clusters


def _cheapest(
    groups: NDArray, clusters: NDArray[np.int64], *, max_picks: int
) -> list[tuple[NDArray[np.int64], NDArray]]:
    """The segments, and the row of each, of every table: groups in one table, or clusters by size."""
    sizes = np.bincount(clusters)
    # As rows of one table, clusters whose sizes are equal to within a factor of 4 waste little.
    bucket = np.ceil(np.log2(sizes) / 2).astype(np.int64)
    counts = [sizes[bucket == one] for one in np.unique(bucket)]
    if _microseconds(np.bincount(groups), max_picks) <= sum(_microseconds(one, max_picks) for one in counts):
        return [(np.arange(len(groups)), groups)]  # this very array: its picks need no sorting out
    chosen = [np.flatnonzero(bucket[clusters] == one) for one in np.unique(bucket)]
    return [(rows, clusters[rows]) for rows in chosen]


def _microseconds(sizes: NDArray, max_picks: int) -> float:
    """About the time of a table whose rows have these sizes, as measured on one core."""
    width = int(sizes.max())
    if width == 1:
        return 100.0
    if _is_one_by_one(len(sizes), width, max_picks):
        return 200 + float((3.0 * np.minimum(sizes, max_picks) + 3e-4 * sizes**2.0).sum())
    return 200 + min(width, max_picks) * (16 + 8e-4 * len(sizes) * width)


def _is_one_by_one(num_rows: int, width: int, max_picks: int) -> bool:
    # All penalties are worth computing where most segments are picked.
    return num_rows <= MAX_ONE_BY_ONE and width <= min(MAX_SIZE_ONE_BY_ONE, 4 * max_picks)


def _pick_all(
    segments: Floats,
    scores: Floats,
    chosen: NDArray[np.int64],
    row_of: NDArray,
    penalty: Penalty,
    log_min: float,
    max_per_group: int,
) -> tuple[NDArray[np.int64], Floats, int]:
    """Picks of the `chosen` segments, and log scores; each row's first is there, whatever its score. The third value is
    that of `soft_nms`."""
    rows = _Rows.of(segments[chosen], scores[chosen], row_of)
    num_rows, width = rows.logs.shape
    if width == 1:
        return chosen, _logs(scores[chosen]), 0
    if _is_local(penalty) and _is_one_by_one(num_rows, width, max_per_group):
        of_rows = [rows.pick_row(row, penalty, log_min, max_per_group) for row in range(num_rows)]
        index, logs = (np.concatenate([one[column] for one in of_rows]) for column in (0, 1))
        return chosen[index], logs, sum(one[2] for one in of_rows)
    picks: list[tuple[NDArray[np.int64], Floats]] = []
    while len(picks) < max_per_group and rows.logs.size:
        rounds = min(ROUNDS_BETWEEN_COMPACTIONS, max_per_group - len(picks), rows.logs.shape[1])
        picks += [rows.pick(penalty) for _ in range(rounds)]
        rows = rows.compacted(log_min)
    index, logs = (np.concatenate(column) for column in zip(*picks, strict=True))
    stays = logs >= log_min
    stays[:num_rows] = True
    return chosen[index[stays]], logs[stays], int((rows.logs >= log_min).sum())


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
        return cls(
            spread(starts, 0.0),
            spread(ends, 0.0),
            spread(ends - starts + LENGTH_EPSILON, 1.0),
            spread(_logs(scores), -np.inf),
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

    def pick_row(
        self, row: int, penalty: Penalty, log_min: float, max_picks: int
    ) -> tuple[NDArray[np.int64], Floats, int]:
        """All picks of one row, until no score is at least `log_min`; the first one in any case."""
        there = np.flatnonzero(self.logs[row] > -np.inf)
        order = there[np.argsort(self.starts[row, there], kind="stable")]
        cluster = Cluster.of(self.starts[row, order], self.ends[row, order], self.lengths[row, order], penalty)
        picks, logs, num_left = cluster.pick(self.logs[row, order], log_min=log_min, max_picks=max_picks)
        return self.index[row, order[picks]], logs, num_left
