"""Mean average precision of temporal action localization.

Class by class, predictions are taken by falling score; each takes the free truth of its video that it overlaps most, if
the tIoU reaches the threshold, and is a true positive; otherwise it is a false positive. Then

    AP = sum over true positives of  (recall step) x (highest precision at this recall or a later one)

Equal scores keep the order of `predictions` (a stable sort; published evaluators leave it to chance, and their numbers
move with it). Of truths overlapped equally, the later one is taken first, as published evaluators do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from re2tal.evaluation.coverage import Coverage
from re2tal.evaluation.matching import Matches
from re2tal.evaluation.protocols import threshold_names
from re2tal.tables import text_table


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
        return dict(zip(threshold_names(self.tiou_thresholds), self.map.tolist(), strict=True))

    def to_json(self) -> dict[str, object]:
        """Everything, in types that `json` writes."""
        per_class = {
            name: {
                "average": float(column.mean()),
                "tiou": dict(zip(threshold_names(self.tiou_thresholds), column.tolist(), strict=True)),
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
        header = ("class", "truths", "predictions", *threshold_names(self.tiou_thresholds), "average")
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


def mean_average_precision(matches: Matches) -> MapReport:
    """AP by threshold and class. Source: Pascal VOC 2010 interpolation as in ActivityNet's eval_detection."""
    truths, num_truths = matches.truths, np.bincount(matches.truths.labels).tolist()
    # A class that nothing predicts has partners (T, 0), and an AP of 0, which counts in the mean.
    columns = [
        area_under(precision_of(of_class >= 0), of_class >= 0, num_truths=count)
        for of_class, count in zip(matches.partners, num_truths, strict=True)
    ]
    return MapReport(
        protocol=matches.protocol.name,
        tiou_thresholds=tuple(matches.thresholds.tolist()),
        classes=truths.classes,
        average_precision=np.stack(columns, axis=1),
        num_truths=tuple(num_truths),
        num_predictions=tuple(map(len, matches.ranked)),
        coverage=matches.predictions.coverage,
    )


def precision_of(true_positive: np.ndarray) -> np.ndarray:
    """(T, N) bool by falling score -> (T, N) share of the predictions up to each that are right."""
    return np.cumsum(true_positive, axis=1) / np.arange(1, true_positive.shape[1] + 1)


def envelope(precision: np.ndarray) -> np.ndarray:
    """(T, N) by falling score -> (T, N) the highest of each or a later one.

    A reader who stops later then has both more recall and more precision.
    """
    return np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]


def area_under(precision: np.ndarray, true_positive: np.ndarray, *, num_truths: int) -> np.ndarray:
    """Two of (T, N) by falling score -> (T,) area under the envelope of the precision over recall."""
    # Only true positives add recall, each 1 / num_truths of it.
    return (envelope(precision) * true_positive).sum(axis=1) / num_truths


def _percent(values: Sequence[float] | np.ndarray) -> list[str]:
    return [f"{100 * value:.2f}" for value in values]
