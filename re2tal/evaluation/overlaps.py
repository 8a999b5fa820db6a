"""Soft-NMS by the pairs of segments that overlap, with all penalties computed before the first pick.

In the order of starts, the segments that begin within one stand in one stretch behind it:

    first[i] <= j < last[i]   for every j that overlaps with i

Where few segments overlap, all groups advance in rounds: a segment that is better than all that it overlaps with stays
the best of them, so that all such segments are picked at once. Where many overlap, a round finds few of them, and one
pick after the other is faster.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]
Indices = NDArray[np.int64]

# That of the compiled extensions of ActionFormer and OpenTAD, in float32 as there.
LENGTH_EPSILON = np.float32(1e-6)
PAIRS_AT_A_TIME = 16_000
"""Their temporary arrays stay in a core's cache: measured, three times as fast as all pairs at once."""


@dataclass(frozen=True)
class Penalty:
    """What a pick subtracts from the log scores of others."""

    of: Callable[[Floats, Floats], Floats]
    """(rows, n) IoU with the pick of each row and (rows, 1) or (rows, n) lengths of that pick -> penalties (rows, n).
    It may write into the first."""
    is_local: bool = True
    """Whether segments that do not overlap leave each other as they are."""
    uses_length: bool = False
    """Whether it depends on which one of the two is picked."""


def padded_lengths(starts: Floats, ends: Floats) -> Floats:
    """Lengths (N,) of which no two add up to 0, also where a segment of another program ends before it starts."""
    return np.maximum(ends - starts, 0) + LENGTH_EPSILON


def reach(segments: Floats, groups: NDArray) -> Indices:
    """For each segment, one past the last of its group that starts before it ends: (N,).

    `segments` (N, 2) must be in the order of `groups` (N,), and of starts in each group.
    """
    # Starts and ends are compared through their places among all starts, which are whole numbers.
    starts = np.sort(segments[:, 0])
    # By ranks, which are exact: a group's are above those of the groups before it.
    above = groups.astype(np.int64) * (len(groups) + 1)
    of_start, of_end = (above + np.searchsorted(starts, segments[:, column]) for column in (0, 1))
    # At least itself: a segment whose end is not after its start reaches nobody.
    return np.maximum(np.searchsorted(of_start, of_end), np.arange(1, len(groups) + 1))


def pick_in_rounds(
    segments: Floats, logs: Floats, last: Indices, order: Indices, *, penalty: Penalty, log_min: float
) -> Floats:
    """Final log scores (N,) of all segments, of any number of groups; what is below `log_min` is suppressed.

    All arguments are in the order that `reach` wants; of equals the one with the lower number in `order` goes first.
    """
    blocks = [
        _chosen(np.flatnonzero((forth > 0) | (back > 0)), one, other, forth, back)
        for one, other, forth, back in _pairs(segments, last, penalty)
    ]
    # Pairs that lower nothing are gone by now, which is most of them where the penalty has a threshold.
    one, other, forth, back = (np.concatenate(column) for column in zip(*blocks, strict=True))
    # The caller's array stays as it is; so does that in `pick_one_by_one`.
    logs, waiting = logs.copy(), logs >= log_min
    while True:
        pairs = np.flatnonzero(waiting.take(one) & waiting.take(other))
        one, other, forth, back = _chosen(pairs, one, other, forth, back)
        # Those that still wait overlap nobody that waits: nothing lowers them any more.
        if not len(one):
            return logs
        left, right = logs.take(one), logs.take(other)
        wins = left > right
        # Rare, so that the order is looked up for them alone.
        ties = np.flatnonzero(left == right)
        wins[ties] = order.take(one.take(ties)) < order.take(other.take(ties))
        picked = waiting.copy()
        # What loses to one neighbour is not the best of its own; all others are picked in this round.
        picked[np.where(wins, other, one)] = False
        by_one, by_other = (np.flatnonzero(picked.take(which)) for which in (one, other))
        lowered = np.concatenate([other.take(by_one), one.take(by_other)])
        # Several picks of a round may lower the same segment: bincount adds them up, plain indexing would take one of
        # them.
        logs -= np.bincount(lowered, np.concatenate([forth.take(by_one), back.take(by_other)]), minlength=len(logs))
        waiting &= ~picked & (logs >= log_min)


def pick_one_by_one(
    segments: Floats, logs: Floats, last: Indices, order: Indices, *, penalty: Penalty, log_min: float, max_picks: int
) -> tuple[Indices, Floats, int]:
    """Picks of one group in their order, their log scores, and how many more reach `log_min`.

    `segments` (N, 2) must be in the order of starts. The first pick counts whatever its score; of segments with equal
    scores the one with the lower number in `order` goes first.
    """
    num = len(logs)
    # A long segment may reach over short ones that ended before: its stretch begins at the first end, so far the
    # latest, after its start.
    ends = np.maximum.accumulate(segments[:, 1])
    first = np.minimum(np.searchsorted(ends, segments[:, 0], side="right"), np.arange(num))
    offsets = np.cumsum(last - first) - (last - first)
    # The row of each segment holds its whole stretch, itself too, so that a pick is one subtraction of neighbours in
    # memory.
    penalties = np.zeros(int((last - first).sum()), dtype=np.float32)
    row = offsets - first
    for one, other, forth, back in _pairs(segments, last, penalty):
        penalties[row.take(one) + other] = forth
        penalties[row.take(other) + one] = back
    logs = logs.copy()
    has_equals = len(np.unique(logs)) < num  # lowered scores hardly ever meet where no two were equal
    # As Python numbers: the loop below takes one at a time.
    stretches = list(zip(first.tolist(), last.tolist(), offsets.tolist(), strict=True))
    picks: list[int] = []
    values: list[float] = []
    for _ in range(min(max_picks, num)):
        best = int(logs.argmax())
        value = logs.item(best)
        # Only now: the first pick stays whatever its score.
        if value < log_min and picks:
            break
        if has_equals:
            equals = np.flatnonzero(logs == value)
            best = int(equals[order.take(equals).argmin()])
        picks.append(best)
        values.append(value)
        begin, end, offset = stretches[best]
        near = logs[begin:end]
        near -= penalties[offset : offset + end - begin]
        # After the subtraction, which included the pick itself.
        logs[best] = -np.inf
    return np.array(picks, dtype=np.int64), np.array(values), int((logs >= log_min).sum())


def _pairs(segments: Floats, last: Indices, penalty: Penalty) -> Iterator[tuple[Indices, Indices, Floats, Floats]]:
    """Each pair (i, j), i < j < last[i]: both numbers, and what i subtracts from j and j from i."""
    starts, ends = segments[:, 0].copy(), segments[:, 1].copy()
    lengths = padded_lengths(starts, ends)
    counts = last - np.arange(1, len(last) + 1)
    before = np.cumsum(counts) - counts
    begin = 0
    while begin < len(counts):
        # At least one row, also where it alone has more pairs than the limit.
        end = max(begin + 1, int(np.searchsorted(before, before[begin] + PAIRS_AT_A_TIME)))
        some, rows = counts[begin:end], np.arange(begin, end)
        one = np.repeat(rows, some)
        other = np.arange(len(one)) + np.repeat(rows + 1 - before[begin:end] + before[begin], some)
        overlap = ends.take(other)
        np.minimum(overlap, np.repeat(ends[begin:end], some), out=overlap)
        overlap -= starts.take(other)
        np.maximum(overlap, 0, out=overlap)
        length, other_length = np.repeat(lengths[begin:end], some), lengths.take(other)
        overlap /= length + other_length - overlap
        iou = overlap[None]
        # Before `forth`, and on a copy: a penalty may write into what it gets.
        back = penalty.of(iou.copy(), other_length[None])[0] if penalty.uses_length else None
        forth = penalty.of(iou, length[None])[0]
        yield one, other, forth, forth if back is None else back
        begin = end


def _chosen(pairs: Indices, *columns: NDArray) -> tuple[NDArray, ...]:
    # Taking by number is several times as fast as by a mask.
    return tuple(column.take(pairs) for column in columns) if len(pairs) < len(columns[0]) else columns
