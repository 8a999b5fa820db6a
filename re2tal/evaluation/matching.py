"""Which true action each prediction takes: class by class, by falling score, the free one that it overlaps most."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from re2tal.evaluation.ground_truth import ANY_CLASS, as_one_class
from re2tal.evaluation.instances import Predictions, Truths, flatten_predictions, flatten_truths, ranked_by
from re2tal.evaluation.protocols import Protocol, check_thresholds, find_protocol
from re2tal.structures import Detections, VideoRecord

MAX_PAIRS = 1 << 22
"""(prediction, truth) pairs compared at once: bounds the memory to a few hundred megabytes"""


@dataclass(frozen=True, slots=True)
class Matches:
    """Who takes which truth: all that the AP of these videos, or of a sample of them, needs."""

    protocol: Protocol
    thresholds: np.ndarray
    """(T,) float64"""
    truths: Truths
    predictions: Predictions
    ranked: Sequence[np.ndarray]
    """By class: rows of the n predictions, best first"""
    partners: Sequence[np.ndarray]
    """By class: (T, n) the truth that each of these takes, or -1"""


def match_predictions(
    predictions: Mapping[str, Detections],
    ground_truth: Sequence[VideoRecord],
    *,
    classes: Sequence[str],
    protocol: Protocol | str,
    tiou_thresholds: Sequence[float],
    blocked_videos: Collection[str] = (),
    class_agnostic: bool = False,
) -> Matches:
    """Match `predictions` (seconds, suppressed) with `ground_truth`, which holds one subset.

    `classes` are the names that the predictions' labels index; the classes of the result are those that have a truth.
    Predictions on videos that are not in `ground_truth` are false positives; `blocked_videos` are left out of both.
    `class_agnostic` takes all labels, predicted and true, for one.

    Raises ValueError for an unknown protocol, thresholds outside (0, 1], ground truth without actions or with a
    repeated video, NaN predictions, and, under "official", a predicted class that has no truth.
    """
    rules = find_protocol(protocol)
    thresholds = check_thresholds(tiou_thresholds)
    if class_agnostic:
        ground_truth, classes = as_one_class(ground_truth), (ANY_CLASS,) * len(classes)
    truths = flatten_truths(ground_truth, protocol=rules, blocked_videos=blocked_videos)
    flat = flatten_predictions(
        predictions, truths, classes=classes, blocked_videos=blocked_videos, class_agnostic=class_agnostic
    )
    # Looked up again by video only where it fails, for the message.
    if rules.refuses_unknown_labels and (flat.labels < 0).any():
        _refuse_unknown(predictions, classes, truths.classes, blocked_videos, rules.name)
    ranked = ranked_by(flat.labels, flat.scores, num=len(truths.classes))
    partners = partners_by_class(flat, truths, ranked, protocol=rules, thresholds=thresholds)
    return Matches(rules, thresholds, truths, flat, ranked, partners)


def partners_by_class(
    flat: Predictions, truths: Truths, ranked: Sequence[np.ndarray], *, protocol: Protocol, thresholds: np.ndarray
) -> list[np.ndarray]:
    """By class, for its n predictions `ranked`, best first: (T, n) index of the truth that each takes, or -1."""
    found = []
    for label, rows in enumerate(ranked):
        own = np.flatnonzero(truths.labels == label)
        # In each class by itself, numbered within it; own[...] numbers them among all truths again.
        matches = find_matches(
            flat.videos[rows],
            flat.segments[rows],
            truths.videos[own],
            truths.segments[own],
            protocol=protocol,
            thresholds=thresholds,
        )
        found.append(np.where(matches >= 0, own[matches], -1))
    return found


def find_matches(
    videos: np.ndarray,
    segments: np.ndarray,
    truth_videos: np.ndarray,
    truth_segments: np.ndarray,
    *,
    protocol: Protocol,
    thresholds: np.ndarray,
) -> np.ndarray:
    """The truth that each of N predictions of one class, given by falling score, takes: (T, N) index, or -1.

    `truth_videos` (M,) must not decrease. Only pairs of one video are ever compared, and the greedy loop only sees
    pairs that reach the threshold: in the order (rank of prediction, falling tIoU), a pair matches if both are free.
    """
    found = np.full((len(thresholds), len(videos)), -1)
    # Once for all thresholds: what reaches a higher one reaches the least.
    ranks, partners, overlaps = _close_pairs(
        videos, segments, truth_videos, truth_segments, protocol=protocol, least=float(thresholds.min())
    )
    for row, threshold in zip(found, thresholds, strict=True):
        reached = overlaps >= threshold
        # Bytes, not an array of bools: a single lookup in NumPy costs several times as much.
        free = bytearray(b"\x01") * len(truth_videos)
        last_matched = -1
        # A prediction's pairs stand together, best overlap first: it takes the first free one, and passes its others
        # over.
        for rank, partner in zip(ranks[reached].tolist(), partners[reached].tolist(), strict=True):
            if rank != last_matched and free[partner]:
                free[partner] = 0
                row[rank] = partner
                last_matched = rank
    return found


def _close_pairs(
    videos: np.ndarray,
    segments: np.ndarray,
    truth_videos: np.ndarray,
    truth_segments: np.ndarray,
    *,
    protocol: Protocol,
    least: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Prediction, truth and tIoU of all pairs of one video with tIoU >= `least`, in the order they are to be tried."""
    # A video's truths are a stretch first .. first + count, as the truths are in the order of their videos.
    first = np.searchsorted(truth_videos, videos, side="left")
    counts = np.searchsorted(truth_videos, videos, side="right") - first
    pieces = []
    for piece in np.array_split(np.arange(len(videos)), 1 + int(counts.sum()) // MAX_PAIRS):
        per_prediction = counts[piece]
        ranks = np.repeat(piece, per_prediction)
        nth_truth = np.arange(len(ranks)) - np.repeat(np.cumsum(per_prediction) - per_prediction, per_prediction)
        partners = np.repeat(first[piece], per_prediction) + nth_truth
        overlaps = protocol.tiou(segments[ranks], truth_segments[partners])
        close = overlaps >= least
        pieces.append((ranks[close], partners[close], overlaps[close]))
    ranks, partners, overlaps = (np.concatenate(parts) for parts in zip(*pieces, strict=True))
    # By rank, then by falling overlap, then the later truth first: the last key is the most important.
    order = np.lexsort((-partners, -overlaps, ranks))
    return ranks[order], partners[order], overlaps[order]


def _refuse_unknown(
    predictions: Mapping[str, Detections],
    classes: Sequence[str],
    known: Sequence[str],
    blocked_videos: Collection[str],
    protocol: str,
) -> None:
    for video_id, detections in predictions.items():
        unknown = {classes[label] for label in set(detections.labels.tolist())} - set(known)
        if unknown and video_id not in blocked_videos:
            raise ValueError(
                f"predictions for video {video_id!r} hold class {min(unknown)!r}, which has no truth in this "
                f"subset; the {protocol!r} protocol refuses that: take them out, or use 'opentad', which ignores them"
            )
