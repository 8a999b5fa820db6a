"""Average recall against the average number of proposals (AR@AN) and the area under that curve; classes don't count.

A truth is found at a threshold if any kept proposal reaches it: no one-to-one matching. With V videos that have a truth
and AN_max proposals wanted per video, every video keeps the same share of its proposals, best first:

    share = AN_max * V / (all proposals, those of other videos too),   kept = int(n * share)

Beside it the recall of the best k x (`top_kx_recall`), where classes count.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from re2tal.evaluation.instances import flatten_predictions, flatten_truths, ranked_by
from re2tal.evaluation.protocols import TIOU_THRESHOLDS, Protocol, check_thresholds, find_protocol
from re2tal.structures import Detections, VideoRecord

REPORTED = (1, 5, 10, 50, 100)
"""Numbers of proposals that papers print AR at; the last of a curve is printed too."""


@dataclass(frozen=True, slots=True)
class RecallReport:
    """Recall at T thresholds and P numbers of proposals."""

    protocol: str
    tiou_thresholds: tuple[float, ...]
    recall: np.ndarray
    """(T, P) float64 in [0, 1]"""
    proposals_per_video: np.ndarray
    """(P,) average number of proposals; the last is the number asked for"""

    @property
    def average_recall(self) -> np.ndarray:
        """(P,) mean over thresholds."""
        return self.recall.mean(axis=0)

    @property
    def auc(self) -> float:
        """Area under average recall over proposals per video, by trapezoids, as a share of the last; in [0, 1]."""
        return float(np.trapezoid(self.average_recall, self.proposals_per_video) / self.proposals_per_video[-1])

    def at(self, num_proposals: float) -> float:
        """AR@AN: average recall at the first point of the curve with at least `num_proposals` per video."""
        # Points are products and quotients of floats, so that the 10th may be 9.999999999999998.
        reached = np.flatnonzero(self.proposals_per_video >= num_proposals - 1e-9)
        if not reached.size:
            raise ValueError(
                f"AR@{num_proposals} was asked, the curve ends at {self.proposals_per_video[-1]:g} proposals"
            )
        return float(self.average_recall[reached[0]])

    def __str__(self) -> str:
        last = float(self.proposals_per_video[-1])
        counts = [count for count in REPORTED if count < last - 1e-9] + [last]
        points = [f"AR@{count:g} {100 * self.at(count):.2f}" for count in counts]
        return "   ".join([*points, f"AUC {100 * self.auc:.2f}"])

    def to_json(self) -> dict[str, object]:
        """The curve and its area, in types that `json` writes."""
        return {
            "protocol": self.protocol,
            "auc": self.auc,
            "average_recall": self.average_recall.tolist(),
            "proposals_per_video": self.proposals_per_video.tolist(),
        }


def average_recall(
    predictions: Mapping[str, Detections],
    ground_truth: Sequence[VideoRecord],
    *,
    classes: Sequence[str],
    protocol: Protocol | str,
    tiou_thresholds: Sequence[float] = TIOU_THRESHOLDS["activitynet"],
    proposals_per_video: int = 100,
    blocked_videos: Collection[str] = (),
) -> RecallReport:
    """Recall of `predictions`, whatever their class, at 1 .. `proposals_per_video` proposals a video on average.

    Arguments and errors as `match_predictions`; an unknown class is no error here. Without any proposal in a
    video that has a truth, recall is 0. Source: ActivityNet's eval_proposal.
    """
    rules = find_protocol(protocol)
    thresholds = check_thresholds(tiou_thresholds)
    if proposals_per_video < 1:
        raise ValueError(f"proposals_per_video is {proposals_per_video}; give at least 1")
    truths = flatten_truths(ground_truth, protocol=rules, blocked_videos=blocked_videos)
    proposals = flatten_predictions(predictions, truths, classes=classes, blocked_videos=blocked_videos)
    report = partial(RecallReport, rules.name, tuple(thresholds.tolist()))
    num_points = 100 if rules.recall_points == "percent" else proposals_per_video
    points = np.arange(1, num_points + 1) / num_points
    wanted = proposals_per_video * float(len(truths.video_ids))

    ranked = ranked_by(proposals.videos, proposals.scores, num=len(truths.video_ids))
    # The share may exceed 1 where there are few proposals: slicing then keeps all. max: without any, there is nothing
    # to share.
    kept = [ranks[: int(len(ranks) * (wanted / max(len(proposals.scores), 1)))] for ranks in ranked]
    num_kept = sum(map(len, kept))
    if not num_kept:
        return report(np.zeros((len(thresholds), num_points)), points * proposals_per_video)
    # The order of these operations decides how int() truncates; it is that of the published code.
    shares = points * (wanted / num_kept)
    found = np.zeros((len(thresholds), num_points))
    bounds = np.searchsorted(truths.videos, np.arange(len(truths.video_ids) + 1))
    for video, ranks in enumerate(kept):
        overlaps = rules.tiou(
            proposals.segments[ranks][None], truths.segments[bounds[video] : bounds[video + 1]][:, None]
        )
        found += _found(overlaps, thresholds, np.minimum((len(ranks) * shares).astype(np.int64), len(ranks)))
    return report(found / len(truths.videos), shares * (num_kept / len(truths.video_ids)))


def top_kx_recall(
    predictions: Mapping[str, Detections],
    ground_truth: Sequence[VideoRecord],
    *,
    classes: Sequence[str],
    protocol: Protocol | str,
    tiou_thresholds: Sequence[float],
    top_k: Sequence[int] = (1, 5),
    blocked_videos: Collection[str] = (),
) -> np.ndarray:
    """Recall@kx (T, K): the share of the truths of a class that its best predictions reach; mean over classes.

    Counted are, in each video, the k x best predictions of the class, where x is its number of truths there. Arguments
    and errors as `match_predictions`. Source: OpenTAD and ActionFormer, on Ego4D's moment queries (top 1x at tIoU 0.5);
    Ego4D's own script wants more than the tIoU, and takes the mean over all truths.
    """
    rules = find_protocol(protocol)
    thresholds = check_thresholds(tiou_thresholds)
    if not top_k or min(top_k) < 1:
        raise ValueError(f"top_k is {tuple(top_k)}; give numbers of at least 1")
    truths = flatten_truths(ground_truth, protocol=rules, blocked_videos=blocked_videos)
    flat = flatten_predictions(predictions, truths, classes=classes, blocked_videos=blocked_videos)
    # One number for each pair of video and class, so that a pair's rows are found by bisection.
    num_classes, num_videos = len(truths.classes), len(truths.video_ids)
    scored = np.flatnonzero((flat.videos >= 0) & (flat.labels >= 0))
    # Scores first, then pairs: the second sort is stable, and keeps a pair's best in front.
    scored = scored[np.argsort(-flat.scores[scored], kind="stable")]
    scored = scored[np.argsort(flat.videos[scored] * num_classes + flat.labels[scored], kind="stable")]
    bounds = np.searchsorted(
        flat.videos[scored] * num_classes + flat.labels[scored], np.arange(num_videos * num_classes + 1)
    )
    pairs = truths.videos * num_classes + truths.labels
    found = np.zeros((len(thresholds), len(top_k), num_classes))
    for pair in np.unique(pairs):
        true = truths.segments[pairs == pair]
        ranked = scored[bounds[pair] : bounds[pair + 1]][: max(top_k) * len(true)]
        overlaps = _finite(rules.tiou(flat.segments[ranked][:, None], true[None]))
        for column, k in enumerate(top_k):
            best = overlaps[: k * len(true)].max(axis=0, initial=0.0)
            found[:, column, pair % num_classes] += (best >= thresholds[:, None]).sum(axis=1)
    # Every class has a truth, as classes are those of the truths: no division by 0.
    return (found / np.bincount(truths.labels, minlength=num_classes)).mean(axis=2)


def _found(overlaps: np.ndarray, thresholds: np.ndarray, num_kept: np.ndarray) -> np.ndarray:
    """(M, n) tIoU of truths and ranked proposals, (P,) how many proposals count -> (T, P) number of truths found."""
    if not overlaps.size:
        return np.zeros((len(thresholds), len(num_kept)))
    reached = _finite(overlaps) >= thresholds[:, None, None]
    # argmax of a row without any True is 0, the best proposal; such a truth is found by none.
    first = np.where(reached.any(axis=2), reached.argmax(axis=2), overlaps.shape[1])
    return (first[:, :, None] < num_kept).sum(axis=1)


def _finite(overlaps: np.ndarray) -> np.ndarray:
    """0 for inf, an empty prediction on an empty truth: in the published recall, unlike in its AP, that is no match."""
    return np.where(np.isfinite(overlaps), overlaps, 0.0)
