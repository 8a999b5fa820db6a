"""The type of each prediction of one video, as DETAD names them (Alwassel et al., ECCV 2018).

The types of `re2tal.evaluation.error_analysis`, at one temporal IoU and for all predictions; that module keeps only the
best of each class, over all videos, and tells counts. Matching never crosses videos, so one video can be typed alone,
and again after each correction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from re2tal.evaluation.error_analysis import BACKGROUND_TIOU, ERRORS, TRUE_POSITIVE
from re2tal.evaluation.protocols import OPENTAD
from re2tal.structures import AMBIGUOUS, Action, Detections

TYPES = (TRUE_POSITIVE, *ERRORS)
"""What `Typed.types` index."""
MISSED = "missed"
"""A true action that no prediction finds."""


@dataclass(frozen=True, slots=True)
class Typed:
    """The types of N predictions against M true actions."""

    types: list[int]
    """(N,) index into TYPES"""
    missed: list[bool]
    """(M,) no prediction takes this action; False for "Ambiguous", which is no truth"""

    def counts(self) -> dict[str, int]:
        """How many there are of each type, without the types that do not occur."""
        of_type = {name: self.types.count(index) for index, name in enumerate(TYPES)} | {MISSED: sum(self.missed)}
        return {name: count for name, count in of_type.items() if count}


def type_predictions(
    detections: Detections, actions: Sequence[Action], *, classes: Sequence[str], tiou: float
) -> Typed:
    """Type the predictions of one video; `classes` are the names that their labels index."""
    true = [place for place, action in enumerate(actions) if action.label != AMBIGUOUS]
    missed = [action.label != AMBIGUOUS for action in actions]
    background = TYPES.index("background")
    if not true or not len(detections):
        return Typed([background] * len(detections), missed)
    # Of both sides, so that a label which only one of them has matches nothing.
    names = {label: number for number, label in enumerate({*classes, *(action.label for action in actions)})}
    labels = np.array([names[label] for label in classes])[detections.labels.numpy()]
    true_labels = np.array([names[actions[place].label] for place in true])
    truths = np.array([(actions[place].start_seconds, actions[place].end_seconds) for place in true])
    # The official one has a prediction that lasts less than nothing match a truth of that length, wherever it lies.
    overlaps = OPENTAD.tiou(detections.segments.double().numpy()[:, None], truths[None])
    types = _without_matches(overlaps, labels, true_labels, tiou)
    fits = (overlaps >= tiou) & (labels[:, None] == true_labels)
    by_score = np.argsort(-detections.scores.double().numpy(), kind="stable")
    for row in by_score[fits.any(axis=1)[by_score]].tolist():
        # Of equal overlaps the later truth is taken, as in `average_precision`.
        free = [(overlaps[row, column], column) for column in np.flatnonzero(fits[row]) if missed[true[column]]]
        if free:
            types[row] = 0
            missed[true[max(free)[1]]] = False
    return Typed(types.tolist(), missed)


def _without_matches(overlaps: np.ndarray, labels: np.ndarray, true_labels: np.ndarray, tiou: float) -> np.ndarray:
    """(N, M), (N,) and (M,) -> (N,) the type that each prediction has if it takes no truth."""
    best, same = overlaps.max(axis=1), true_labels[overlaps.argmax(axis=1)] == labels
    near, touching = best >= tiou, best >= BACKGROUND_TIOU
    kinds = {
        "double detection": near & same,
        "wrong label": near,
        "localization": touching & same,
        "confusion": touching,
    }
    # The first condition that holds counts.
    return np.select([*kinds.values()], [TYPES.index(kind) for kind in kinds], TYPES.index("background"))
