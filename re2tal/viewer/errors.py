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
from re2tal.evaluation.protocols import PROTOCOLS
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
    segments = detections.segments.double().numpy()
    truths = np.array([(actions[place].start_seconds, actions[place].end_seconds) for place in true])
    overlaps = PROTOCOLS["official"].tiou(segments[:, None], truths[None])
    labels = [classes[label] for label in detections.labels.tolist()]
    true_labels = [actions[place].label for place in true]
    types = _without_matches(overlaps, labels, true_labels, tiou)
    for row in np.argsort(-detections.scores.double().numpy(), kind="stable").tolist():
        # Of equal overlaps the later truth is taken, as in `average_precision`.
        free = [
            (overlaps[row, column], column)
            for column in np.flatnonzero(overlaps[row] >= tiou).tolist()
            if true_labels[column] == labels[row] and missed[true[column]]
        ]
        if free:
            types[row] = 0
            missed[true[max(free)[1]]] = False
    return Typed(types, missed)


def _without_matches(overlaps: np.ndarray, labels: Sequence[str], true_labels: Sequence[str], tiou: float) -> list[int]:
    """(N, M) -> (N,) the type that each prediction has if it takes no truth."""
    nearest = overlaps.argmax(axis=1).tolist()
    types = []
    for overlap, label, column in zip(overlaps.max(axis=1).tolist(), labels, nearest, strict=True):
        same = true_labels[column] == label
        if overlap >= tiou:
            name = "double detection" if same else "wrong label"
        elif overlap >= BACKGROUND_TIOU:
            name = "localization" if same else "confusion"
        else:
            name = "background"
        types.append(TYPES.index(name))
    return types
