"""Which of a clip's predictions go on to suppression.

A prediction is a (point, class) pair. OpenTAD takes the best of all levels together; the original ActionFormer takes
the best of each level and drops segments that are too short.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor


class Candidates(NamedTuple):
    """N candidates of one clip."""

    segments: Tensor
    """(N, 2) steps; may reach beyond the clip"""
    scores: Tensor
    """(N,)"""
    labels: Tensor
    """(N,) int64"""


def best_of_clip(
    segments: Tensor, scores: Tensor, levels: Tensor | None = None, *, min_score: float, top_k: int
) -> Candidates:
    """The `top_k` scores above `min_score`, best first; with a single class simply everything.

    `segments` (P, 2), or one per class (P, K, 2), and `scores` (P, K) of the clip's real points. `levels` does not
    count; it is there for `best_of_each_level`, which this is exchanged with.
    """
    # As OpenTAD: with one class, the number of candidates is that of points, and none is left out before suppression.
    if scores.shape[1] == 1:
        return Candidates(
            segments.reshape(-1, 2), scores[:, 0], torch.zeros(len(scores), dtype=torch.int64, device=scores.device)
        )
    return _best(segments, scores, min_score=min_score, top_k=top_k)


def best_of_each_level(
    segments: Tensor, scores: Tensor, levels: Tensor, *, min_score: float, top_k: int, min_steps: float
) -> Candidates:
    """Level by level the `top_k` scores above `min_score`, then only segments longer than `min_steps`.

    As `best_of_clip`; `levels` (P,) is anything that is equal for the points of one level and rises with the level.
    """
    best = partial(_best, min_score=min_score, top_k=top_k)
    # `unique` gives them in rising order, finest first, which is the order of the original.
    per_level = [best(segments[levels == level], scores[levels == level]) for level in levels.unique()]
    per_level = per_level or [best(segments, scores)]  # a clip without a real step
    found = Candidates(*(torch.cat(column) for column in zip(*per_level, strict=True)))
    long_enough = found.segments[:, 1] - found.segments[:, 0] > min_steps
    return Candidates(*(column[long_enough] for column in found))


def _best(segments: Tensor, scores: Tensor, *, min_score: float, top_k: int) -> Candidates:
    flat = scores.flatten()
    # Before sorting, because most of the P * K scores are near 0.
    above = (flat > min_score).nonzero()[:, 0]
    best, order = flat[above].sort(descending=True)
    # Place p * K + k of `flat` is class k at point p.
    chosen = above[order[:top_k]]
    num_classes = scores.shape[1]
    found = segments[chosen // num_classes] if segments.ndim == 2 else segments.flatten(0, 1)[chosen]
    return Candidates(found, best[:top_k], chosen % num_classes)
