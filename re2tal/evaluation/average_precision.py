"""Mean average precision of temporal action localization.

Class by class, predictions are taken by falling score; each takes the free truth of its video that it overlaps most, if
the tIoU reaches the threshold, and is a true positive; otherwise it is a false positive. Then

    AP = sum over true positives of  (recall step) x (highest precision at this recall or a later one)

Equal scores keep the order of `predictions` (a stable sort; published evaluators leave it to chance, and their numbers
move with it). Of truths overlapped equally, the later one is taken first, as published evaluators do.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from re2tal.evaluation.coverage import Coverage
from re2tal.evaluation.ground_truth import ANY_CLASS, as_one_class
from re2tal.evaluation.instances import Predictions, Truths, flatten_predictions, flatten_truths
from re2tal.evaluation.protocols import Protocol, check_thresholds, find_protocol
from re2tal.structures import Detections, VideoRecord
from re2tal.tables import text_table

MAX_PAIRS = 1 << 22
"""(prediction, truth) pairs compared at once: bounds the memory to a few hundred megabytes"""


@dataclass(frozen=True, slots=True)
class MapReport:
    """Average precision by threshold and class; `str()` is a table in percent."""

    protocol: str
    tiou_thresholds: tuple[float, ...]
    classes: tuple[str, ...]
    """the K classes that have a truth, in order of first appearance"""
    average_precision: np.ndarray
    """(T, K) float64 in [0, 1]"""
    num_truths: tuple[int, ...]
    """by class"""
    num_predictions: tuple[int, ...]
    """by class"""
    coverage: Coverage
    """what was scored, and what did not meet"""

    @property
    def map(self) -> np.ndarray:
        """(T,) mean over classes."""
        return self.average_precision.mean(axis=1)

    @property
    def average_map(self) -> float:
        """Mean over thresholds: the number that papers compare."""
        return float(self.map.mean())

    @property
    def map_by_tiou(self) -> dict[str, float]:
        """{"0.3": ..., "0.4": ...}, for logs and JSON."""
        return dict(zip(self._columns(), self.map.tolist(), strict=True))

    def to_json(self) -> dict[str, object]:
        """Everything, in types that `json` writes."""
        per_class = {
            name: {
                "average": float(column.mean()),
                "tiou": dict(zip(self._columns(), column.tolist(), strict=True)),
                "truths": truths,
                "predictions": predictions,
            }
            for name, column, truths, predictions in zip(
                self.classes, self.average_precision.T, self.num_truths, self.num_predictions, strict=True
            )
        }
        return {
            "protocol": self.protocol,
            "average_map": self.average_map,
            "map": self.map_by_tiou,
            "classes": per_class,
            "coverage": self.coverage.to_json(),
        }

    def rows(self) -> list[tuple[str, ...]]:
        """The table as text cells: a header, one row per class, the mean; AP in percent."""
        header = ("class", "truths", "predictions", *self._columns(), "average")
        body = [
            (name, str(truths), str(predictions), *_percent(column), *_percent([column.mean()]))
            for name, column, truths, predictions in zip(
                self.classes, self.average_precision.T, self.num_truths, self.num_predictions, strict=True
            )
        ]
        mean = ("mAP", str(sum(self.num_truths)), str(sum(self.num_predictions)))
        return [header, *body, (*mean, *_percent(self.map), *_percent([self.average_map]))]

    def __str__(self) -> str:
        table = text_table(self.rows(), align="<>", rules=(1, -1))
        heading = [f"AP in %, by tIoU; protocol {self.protocol}", self.coverage.facts()]
        return "\n".join([*heading, *(f"note: {note}" for note in self.coverage.notes()), table])

    def _columns(self) -> tuple[str, ...]:
        return tuple(f"{threshold:.4g}" for threshold in self.tiou_thresholds)


def mean_average_precision(
    predictions: Mapping[str, Detections],
    ground_truth: Sequence[VideoRecord],
    *,
    classes: Sequence[str],
    protocol: Protocol | str,
    tiou_thresholds: Sequence[float],
    blocked_videos: Collection[str] = (),
    class_agnostic: bool = False,
    max_per_video: int | None = None,
) -> MapReport:
    """Score `predictions` (seconds, suppressed) against `ground_truth`, which holds one subset.

    `classes` are the names that the predictions' labels index; the classes of the result are those that have a truth.
    Predictions on videos that are not in `ground_truth` are false positives; `blocked_videos` are left out of both.
    `class_agnostic` takes all labels, predicted and true, for one. `max_per_video`: the limit that the predictions were
    suppressed with; the report says where it cut.

    Raises ValueError for an unknown protocol, thresholds outside (0, 1], ground truth without actions or with a
    repeated video, NaN predictions, and, under "official", a predicted class that has no truth.

    Source: Pascal VOC 2010 interpolation as in ActivityNet's eval_detection.
    """
    rules = find_protocol(protocol) if isinstance(protocol, str) else protocol
    thresholds = check_thresholds(tiou_thresholds)
    if class_agnostic:
        ground_truth, classes = as_one_class(ground_truth), (ANY_CLASS,) * len(classes)
    truths = flatten_truths(ground_truth, protocol=rules, blocked_videos=blocked_videos)
    flat = flatten_predictions(
        predictions,
        truths,
        classes=classes,
        blocked_videos=blocked_videos,
        class_agnostic=class_agnostic,
        max_per_video=max_per_video,
    )
    if rules.refuses_unknown_labels and (flat.labels < 0).any():
        _refuse_unknown(predictions, classes, truths.classes, blocked_videos, rules.name)

    ranked, num_truths = ranked_by_class(flat, num_classes=len(truths.classes)), np.bincount(truths.labels).tolist()
    partners = partners_by_class(flat, truths, ranked, protocol=rules, thresholds=thresholds)
    columns = [
        interpolated_average_precision(of_class >= 0, num_truths=count)
        for of_class, count in zip(partners, num_truths, strict=True)
    ]
    return MapReport(
        protocol=rules.name,
        tiou_thresholds=tuple(thresholds.tolist()),
        classes=truths.classes,
        average_precision=np.stack(columns, axis=1),
        num_truths=tuple(num_truths),
        num_predictions=tuple(map(len, ranked)),
        coverage=flat.coverage,
    )


def ranked_by_class(flat: Predictions, *, num_classes: int) -> list[np.ndarray]:
    """Rows of the predictions of each class, best first."""
    by_score = np.argsort(-flat.scores, kind="stable")
    by_class = by_score[np.argsort(flat.labels[by_score], kind="stable")]
    bounds = np.searchsorted(flat.labels[by_class], np.arange(num_classes + 1))
    return [by_class[first:end] for first, end in pairwise(bounds)]


def partners_by_class(
    flat: Predictions, truths: Truths, ranked: Sequence[np.ndarray], *, protocol: Protocol, thresholds: np.ndarray
) -> list[np.ndarray]:
    """By class, for its n predictions `ranked`, best first: (T, n) index of the truth that each takes, or -1."""
    found = []
    for label, rows in enumerate(ranked):
        own = np.flatnonzero(truths.labels == label)
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
    ranks, partners, overlaps = _close_pairs(
        videos, segments, truth_videos, truth_segments, protocol=protocol, least=float(thresholds.min())
    )
    for row, threshold in zip(found, thresholds, strict=True):
        reached = overlaps >= threshold
        free = bytearray(b"\x01") * len(truth_videos)
        last_matched = -1
        for rank, partner in zip(ranks[reached].tolist(), partners[reached].tolist(), strict=True):
            if rank != last_matched and free[partner]:
                free[partner] = 0
                row[rank] = partner
                last_matched = rank
    return found


def interpolated_average_precision(true_positive: np.ndarray, *, num_truths: int) -> np.ndarray:
    """(T, N) bool by falling score -> (T,) area under the precision envelope over recall."""
    found = np.cumsum(true_positive, axis=1)
    precision = found / np.arange(1, true_positive.shape[1] + 1)
    envelope = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    return (envelope * true_positive).sum(axis=1) / num_truths


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


def _percent(values: Sequence[float] | np.ndarray) -> list[str]:
    return [f"{100 * value:.2f}" for value in values]
