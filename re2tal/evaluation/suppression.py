"""From the detections of one video to those worth showing: suppression of repeats, and voting."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from re2tal.evaluation.overlaps import Floats, Penalty
from re2tal.evaluation.soft_nms import soft_nms
from re2tal.options import COUNT, FINITE, NOT_NEGATIVE, POSITIVE, SHARE, Range, check_ranges, option
from re2tal.structures import Detections

# Others write 0 for no votes. Here it would let all segments vote, those that do not overlap too.
_VOTES = Range(lambda value: 0 < value <= 1, "a number above 0, up to 1, or null for no votes")


@dataclass(frozen=True)
class SuppressionConfig:
    """Suppression of repeated detections in one video; the defaults are those of Re2TAL on THUMOS-14."""

    method: Literal["gaussian", "linear", "gaussian_above", "hard", "none"] = "gaussian"
    """How a better segment lowers the score of one it overlaps with. "gaussian": exp(-IoU^2 / sigma). "linear": 1 - IoU
    from `iou_threshold` on. "gaussian_above": gaussian from an IoU of `overlap_base` + `overlap_slope` * length of the
    better one (BMN). "hard": dropped from `iou_threshold` on. "none": not at all."""
    sigma: float = option(0.7, within=POSITIVE)
    """Of the gaussian; larger is milder."""
    iou_threshold: float = option(0.1, within=SHARE)
    """Of "linear" and "hard"."""
    overlap_base: float = option(0.5, within=SHARE)
    """Of "gaussian_above"."""
    overlap_slope: float = option(0.0, within=FINITE)
    """Of "gaussian_above", per unit of length."""
    min_score: float = option(0.001, within=NOT_NEGATIVE)
    """A segment whose lowered score is below goes; the best of each group always stays, except under "hard", which
    drops every score that is not above."""
    max_per_video: int = option(2000, within=COUNT)
    """At most this many detections, the best ones; also the limit per class."""
    max_per_minute: float | None = option(None, within=POSITIVE)
    """Where this is more, the limit is so many for each minute between the first start and the last end of what was
    found in the video; None: `max_per_video` whatever the length."""
    per_class: bool = True
    """Only segments of the same class suppress each other."""
    voting_threshold: float | None = option(None, within=_VOTES)
    """Replace each kept segment by the mean, weighted by score, of all segments that overlap it by at least this IoU;
    None keeps it. With `per_class` only segments of its class vote, as in the original ActionFormer; OpenTAD's recipes
    do not vote there."""
    weigh_votes_by_overlap: bool = False
    """Weigh votes by score * IoU, as the original ActionFormer does, instead of by score, as OpenTAD does."""

    def __post_init__(self) -> None:
        known = sorted([*_PENALTIES, "none"])
        if self.method not in known:
            raise ValueError(f"suppression.method is {self.method!r}, which is unknown; known: {known}")
        check_ranges(self, "suppression")

    def limit(self, segments: Floats) -> int:
        """How many of a video's (N, 2) segments, in seconds, may stay."""
        if self.max_per_minute is None or not len(segments):
            return self.max_per_video
        minutes = float(segments[:, 1].max() - segments[:, 0].min()) / 60
        return max(self.max_per_video, math.ceil(self.max_per_minute * minutes))


def suppress(detections: Detections, config: SuppressionConfig) -> Detections:
    """The detections of one video, thinned out and best first, on the CPU.

    Any unit of time serves, save for `overlap_slope` and `max_per_minute`. Raises ValueError for detections that are
    not finite.
    """
    segments, scores, labels = (
        x.detach().cpu().numpy() for x in (detections.segments.float(), detections.scores.float(), detections.labels)
    )
    if not (np.isfinite(segments).all() and np.isfinite(scores).all()):
        raise ValueError("detections hold NaN or infinite times or scores; look for a loss that diverged in training")
    limit = config.limit(segments)
    if config.method == "none":
        kept, new_scores, num_left = np.arange(len(scores)), scores, 0
    else:
        kept, new_scores, num_left = _thin_out(segments, scores, labels, config, limit)
    num_cut = num_left + max(0, len(kept) - limit)
    # The limit again, now over all classes; suppression applied it to each.
    best = np.argsort(-new_scores, kind="stable")[:limit]
    kept, new_scores = kept[best], new_scores[best]
    new_segments, new_labels = segments[kept], labels[kept]
    if (threshold := config.voting_threshold) is not None:
        groups = [(new_labels == label, labels == label) for label in np.unique(new_labels)]
        for mine, voters in groups if config.per_class else [(np.s_[:], np.s_[:])]:
            new_segments[mine] = vote(
                new_segments[mine],
                segments[voters],
                scores[voters],
                threshold=threshold,
                weigh_by_overlap=config.weigh_votes_by_overlap,
            )
    found = Detections(torch.from_numpy(new_segments), torch.from_numpy(new_scores), torch.from_numpy(new_labels))
    return replace(found, num_cut=num_cut)


def _thin_out(
    segments: Floats, scores: Floats, labels: NDArray, config: SuppressionConfig, limit: int
) -> tuple[NDArray, Floats, int]:
    """Indices of what stays, its scores, and how many more might have, but for the limit."""
    eligible = np.arange(len(scores))
    min_score = config.min_score
    # Scores are not lowered there, so that the minimum can be applied before, strictly; what stays, stays at any score.
    if config.method == "hard":
        if min_score > 0:
            eligible = np.flatnonzero(scores > min_score)
        min_score = 0.0
    kept, new_scores, num_left = soft_nms(
        segments[eligible],
        scores[eligible],
        labels[eligible] if config.per_class else np.zeros_like(eligible),
        penalty=_PENALTIES[config.method](config),
        min_score=min_score,
        max_per_group=limit,
    )
    kept = eligible[kept]
    return kept, scores[kept] if config.method == "hard" else new_scores, num_left


def _gaussian(config: SuppressionConfig) -> Penalty:
    scale = np.float32(1 / config.sigma)
    return Penalty(lambda iou, length: np.multiply(np.multiply(iou, iou, out=iou), scale, out=iou))


def _gaussian_above(config: SuppressionConfig) -> Penalty:
    gaussian, base, slope = _gaussian(config), np.float32(config.overlap_base), np.float32(config.overlap_slope)

    def penalty(iou: Floats, length: Floats) -> Floats:
        mild = iou < base + slope * length
        iou = gaussian.of(iou, length)
        iou[mild] = 0.0
        return iou

    return Penalty(penalty, uses_length=True)


def _linear(config: SuppressionConfig) -> Penalty:
    # log(0) is minus infinity, which multiplied by 0, where nothing is lowered, is NaN.
    smallest = np.finfo(np.float32).tiny

    def penalty(iou: Floats, length: Floats) -> Floats:
        lowers = iou >= config.iou_threshold
        np.subtract(np.float32(1), iou, out=iou)
        np.log(np.maximum(iou, smallest, out=iou), out=iou)
        return np.multiply(iou, np.negative(lowers, dtype=np.float32), out=iou)

    return Penalty(penalty)


def _hard(config: SuppressionConfig) -> Penalty:
    threshold = config.iou_threshold
    return Penalty(
        lambda iou, length: np.where(iou >= threshold, np.float32(np.inf), np.float32(0)), is_local=threshold > 0
    )


_PENALTIES: dict[str, Callable[[SuppressionConfig], Penalty]] = {
    "gaussian": _gaussian,
    "gaussian_above": _gaussian_above,
    "linear": _linear,
    "hard": _hard,
}


def vote(kept: Floats, segments: Floats, scores: Floats, *, threshold: float, weigh_by_overlap: bool) -> Floats:
    """Each of K kept segments as the weighted mean of those of N `segments` with an IoU of at least `threshold`.

    Segments are float32 (K, 2) and (N, 2), scores (N,) are those from before suppression.
    """
    means = kept.copy()
    # A few million pairs at a time: a long video has tens of thousands of candidates.
    rows = max(1, 4_000_000 // max(1, len(segments)))
    for first in range(0, len(kept), rows):
        some = kept[first : first + rows, None]
        overlap = np.minimum(some[..., 1], segments[:, 1]) - np.maximum(some[..., 0], segments[:, 0])
        overlap = np.maximum(overlap, 0)
        union = (some[..., 1] - some[..., 0]) + (segments[:, 1] - segments[:, 0]) - overlap
        iou = np.divide(overlap, union, out=np.zeros_like(overlap), where=union > 0)
        # A float64 zero makes the sums float64: thousands of float32 seconds added up would lose milliseconds.
        weights = np.where(iou >= threshold, scores * iou if weigh_by_overlap else scores, np.float64(0))
        total = weights.sum(axis=1, keepdims=True)
        # Nobody votes for a segment without length, or among scores of zero: it stays as it is.
        voted = total[:, 0] > 0
        means[first : first + rows][voted] = (weights[voted] / total[voted]) @ segments
    return means
