"""Which detections a user wants to see, and which of a stream are final.

Suppression picks the best detection first and only ever lowers scores. So those that begin below `min_score` neither
end above it nor change one that does, and may go before suppression; only with voting must they stay for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches

import torch
from torch import Tensor

from re2tal.evaluation.suppression import SuppressionConfig, suppress
from re2tal.options import COUNT, SHARE, check
from re2tal.structures import Detections

MOST_WINDOWS_HELD = 16
"""A chain of overlapping detections of this length ends, so that an endless stream needs no endless memory."""


@dataclass(frozen=True, slots=True)
class Selection:
    """Of a video's detections."""

    min_score: float = 0.0
    """those with this score or more, after suppression"""
    top: int | None = None
    """the best so many of each video; None: all"""
    labels: frozenset[int] | None = None
    """indices of the classes that are wanted; None: all"""

    def __post_init__(self) -> None:
        check("min_score", self.min_score, SHARE)
        check("top", self.top, COUNT)

    def before(self, detections: Detections, suppression: SuppressionConfig) -> Detections:
        """Without those that cannot matter, to save memory and time; not suppressed yet."""
        # Weak detections vote on the boundaries of strong ones.
        if suppression.voting_threshold is not None:
            return detections
        keep = ~(detections.scores < self.min_score)  # NaN stays, to be found by suppression
        # Without classes, an unwanted one may suppress a wanted one.
        if self.labels is not None and suppression.per_class:
            keep &= self._is_wanted(detections.labels)
        return pick(detections, keep)

    def after(self, detections: Detections) -> Detections:
        """Of suppressed ones, which are sorted."""
        # Again: suppression has lowered scores since.
        keep = detections.scores >= self.min_score
        if self.labels is not None:
            keep &= self._is_wanted(detections.labels)
        chosen = pick(detections, keep)
        return chosen if self.top is None else pick(chosen, torch.arange(len(chosen)) < self.top)

    def _is_wanted(self, labels: Tensor) -> Tensor:
        return torch.isin(labels, torch.tensor(sorted(self.labels or ()), dtype=labels.dtype, device=labels.device))


def labels_of(classes: Sequence[str], wanted: Sequence[str]) -> frozenset[int] | None:
    """Indices of the classes named `wanted`; None where none is named. ValueError for an unknown one."""
    unknown = [name for name in wanted if name not in classes]
    if unknown:
        near = get_close_matches(unknown[0], classes, n=1)
        known = f"{f'did you mean {near[0]!r}? It' if near else 'it'} knows {', '.join(classes)}"
        raise ValueError(f"classes has {unknown[0]!r}, which the model does not know; {known}")
    # Nothing named is no wish, rather than a wish for nothing.
    return frozenset(classes.index(name) for name in wanted) or None


def pick(detections: Detections, keep: Tensor) -> Detections:
    """Those where `keep` (N,) is True."""
    return replace(
        detections, segments=detections.segments[keep], scores=detections.scores[keep], labels=detections.labels[keep]
    )


class Settling:
    """Detections of windows that come one after the other -> actions that no later window can change.

    Detections of one class (of any, where classes suppress each other) that overlap, directly or through others, are
    suppressed together, as soon as all of them end before `reach_seconds` before the newest window; a detection of a
    later window is cut there. Seconds are float64: a stream may last for weeks.
    """

    def __init__(self, suppression: SuppressionConfig, selection: Selection, *, reach_seconds: float) -> None:
        self.suppression = suppression
        self.selection = selection
        self.reach_seconds = reach_seconds
        self._waiting = Detections(
            torch.zeros(0, 2, dtype=torch.float64), torch.zeros(0), torch.zeros(0, dtype=torch.int64)
        )
        self._settled_seconds = 0.0

    def add(self, detections: Detections, *, window_seconds: float) -> Detections:
        """Those of the window that starts at `window_seconds`, not suppressed; gives what is final now, by start."""
        detections = self.selection.before(detections, self.suppression)
        segments = detections.segments.double()
        # What ends where all is settled has nothing left after the cut; an empty one that lies later keeps its chance.
        is_new = (segments[:, 0] >= self._settled_seconds) | (segments[:, 1] > self._settled_seconds)
        segments = segments.clamp(min=self._settled_seconds)
        new = pick(Detections(segments, detections.scores, detections.labels), is_new)
        self._waiting = _joined(self._waiting, new)
        # Never back: what was handed out is final, and a window may come out of order.
        self._settled_seconds = max(self._settled_seconds, window_seconds - self.reach_seconds)
        return self._settle(longest_seconds=MOST_WINDOWS_HELD * self.reach_seconds)

    def end(self, *, duration_seconds: float) -> Detections:
        """What is left, when the last window has come."""
        waiting = self._waiting
        segments = waiting.segments.clamp(max=duration_seconds)
        self._waiting = Detections(segments, waiting.scores, waiting.labels)
        # Everything ends before that, so that all groups are final.
        self._settled_seconds = float("inf")
        return self._settle(longest_seconds=float("inf"))

    def _settle(self, *, longest_seconds: float) -> Detections:
        waiting = self._waiting
        if not len(waiting):
            return waiting
        groups = _overlapping(waiting.segments, waiting.labels if self.suppression.per_class else None)
        num_groups = int(groups.max()) + 1
        # Neutral elements of max and min, as scatter_reduce_ takes what stands there into account.
        ends = torch.full((num_groups,), -torch.inf, dtype=torch.float64)
        ends.scatter_reduce_(0, groups, waiting.segments[:, 1], "amax")
        starts = torch.full((num_groups,), torch.inf, dtype=torch.float64)
        starts.scatter_reduce_(0, groups, waiting.segments[:, 0], "amin")
        # Final since no later window can reach it, or because the chain has grown too long to be held.
        final = (ends <= self._settled_seconds) | (self._settled_seconds - starts > longest_seconds)
        is_final = final[groups]
        self._waiting = pick(waiting, ~is_final)
        found = [self._suppressed(pick(waiting, groups == group)) for group in final.nonzero()[:, 0]]
        done = _joined(*found) if found else pick(waiting, torch.zeros(len(waiting), dtype=torch.bool))
        order = torch.argsort(done.segments[:, 0], stable=True)
        return Detections(done.segments[order], done.scores[order], done.labels[order])

    def _suppressed(self, group: Detections) -> Detections:
        origin = group.segments.min()  # float32, which suppression takes, counts days in steps of milliseconds
        near = suppress(Detections(group.segments - origin, group.scores, group.labels), self.suppression)
        # Suppression keeps the best of each class whatever its score: once for a video, but not once for each group of
        # a stream.
        kept = pick(near, near.scores >= self.suppression.min_score)
        return self.selection.after(Detections(kept.segments.double() + origin, kept.scores, kept.labels))


def _joined(*parts: Detections) -> Detections:
    columns = zip(*((one.segments, one.scores, one.labels) for one in parts), strict=True)
    return Detections(*(torch.cat(column) for column in columns))


def _overlapping(segments: Tensor, labels: Tensor | None) -> Tensor:
    """(N, 2) seconds -> (N,) number of the group of each: those of a label that overlap, directly or through others."""
    labels = torch.zeros(len(segments), dtype=torch.int64) if labels is None else labels
    groups = torch.empty(len(segments), dtype=torch.int64)
    first = 0
    for label in labels.unique():
        places = (labels == label).nonzero()[:, 0]
        places = places[torch.argsort(segments[places, 0], stable=True)]
        # The latest end so far, not the last one's: a long segment may enclose short ones.
        ends = segments[places, 1].cummax(0).values
        begins = torch.ones(len(places), dtype=torch.bool)
        # Segments that touch have no overlap, and cannot lower each other.
        begins[1:] = segments[places[1:], 0] >= ends[:-1]
        groups[places] = first + begins.cumsum(0) - 1
        first += int(begins.sum())
    return groups
