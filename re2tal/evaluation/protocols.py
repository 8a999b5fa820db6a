"""The points on which the two public evaluators disagree, one row each.

    official   ActivityNet's eval_detection and eval_proposal
    opentad    OpenTAD's mAP and Recall; the numbers that most papers since 2023 print

tIoU(a, b) = |a and b| / |a or b|, where the union is len(a) + len(b) - intersection. Everything else they agree on:
a prediction and a truth can match at tIoU >= threshold, and classes are those that have a truth in the subset.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from re2tal.structures import Action

# Both as in OpenTAD's evaluator.
DUPLICATE_SECONDS = 1e-3
MIN_UNION_SECONDS = 1e-8


@dataclass(frozen=True, slots=True)
class Protocol:
    """One way to count; `PROTOCOLS` holds the two that are in use."""

    name: str
    drops_empty_truths: bool
    """an annotation whose end is not after its start is left out"""
    drops_duplicate_truths: bool
    """an annotation within 1e-3 s, at both ends, of an earlier one of its label and video is left out"""
    refuses_unknown_labels: bool
    """a predicted class without any truth in the subset is an error; otherwise such predictions are left out"""
    empty_union_matches: bool
    """0 / 0, an empty prediction against an empty truth, wherever the two lie: a match at every threshold, and the
    first that is tried (a NaN sorts to the front, and is not below any threshold); otherwise the union is at least
    1e-8 s and the two don't match"""
    recall_points: Literal["percent", "proposals"]
    """AR@AN is taken at 1 .. 100 % of the average number of proposals, or at 1, 2, ... of them"""

    def select(self, actions: Sequence[Action]) -> list[Action]:
        """The annotations of one video that count, in their order."""
        kept: list[Action] = []
        for action in actions:
            if self.drops_empty_truths and action.end_seconds <= action.start_seconds:
                continue
            # Compared with those that were kept: of three in a row, each near the next, the third may stay.
            if self.drops_duplicate_truths and any(_same(action, earlier) for earlier in kept):
                continue
            kept.append(action)
        return kept

    def tiou(self, predicted: np.ndarray, true: np.ndarray) -> np.ndarray:
        """Temporal IoU of segments (..., 2) and (..., 2), broadcast; inf is "matches at any threshold"."""
        overlap = np.minimum(predicted[..., 1], true[..., 1]) - np.maximum(predicted[..., 0], true[..., 0])
        overlap = overlap.clip(min=0.0)
        union = (predicted[..., 1] - predicted[..., 0]) + (true[..., 1] - true[..., 0]) - overlap
        if not self.empty_union_matches:
            return overlap / union.clip(min=MIN_UNION_SECONDS)
        # A reversed prediction as long as the truth has no union either, nor an intersection.
        return np.divide(overlap, union, out=np.full_like(overlap, np.inf), where=union != 0)


OFFICIAL = Protocol(
    name="official",
    drops_empty_truths=False,
    drops_duplicate_truths=False,
    refuses_unknown_labels=True,
    empty_union_matches=True,
    recall_points="percent",
)
OPENTAD = Protocol(
    name="opentad",
    drops_empty_truths=True,
    drops_duplicate_truths=True,
    refuses_unknown_labels=False,
    empty_union_matches=False,
    recall_points="proposals",
)
EPIC_KITCHENS = replace(OFFICIAL, name="epic-kitchens", refuses_unknown_labels=False, empty_union_matches=False)
"""EPIC-Kitchens-100's own evaluator of detected actions: all truths count, predicted classes without a truth do not."""
PROTOCOLS = {protocol.name: protocol for protocol in (OFFICIAL, OPENTAD)}


def find_protocol(name: Protocol | str) -> Protocol:
    """The row of that name, or a row of one's own as it is; ValueError with the known names otherwise."""
    if isinstance(name, Protocol):
        return name
    if name not in PROTOCOLS:
        raise ValueError(f"unknown protocol {name!r}; known: {sorted(PROTOCOLS)}")
    return PROTOCOLS[name]


def tiou_range(first: float, last: float, num: int) -> tuple[float, ...]:
    """`num` evenly spaced thresholds. As published code has them, 0.3:0.1:0.7 holds 0.39999999999999997, not 0.4."""
    # linspace, as there: an overlap that is 0.4 exactly reaches 0.39999999999999997.
    return tuple(np.linspace(first, last, num).tolist())


def threshold_names(tiou_thresholds: Sequence[float]) -> tuple[str, ...]:
    """As tables, logs and JSON call them: "0.3", "0.4", ..."""
    return tuple(f"{threshold:.4g}" for threshold in tiou_thresholds)


ProtocolName = Literal["opentad", "official"]
Dataset = Literal[
    "activitynet", "hacs", "fineaction", "thumos14", "demo", "epic-kitchens", "ego4d-mq", "multithumos", "charades"
]

TIOU_THRESHOLDS: dict[Dataset, tuple[float, ...]] = {
    "activitynet": tiou_range(0.5, 0.95, 10),
    "hacs": tiou_range(0.5, 0.95, 10),
    "fineaction": tiou_range(0.5, 0.95, 10),
    "thumos14": tiou_range(0.3, 0.7, 5),
    "demo": tiou_range(0.3, 0.7, 5),
    "epic-kitchens": tiou_range(0.1, 0.5, 5),
    "ego4d-mq": tiou_range(0.1, 0.5, 5),
    "multithumos": tiou_range(0.1, 0.9, 9),
    "charades": tiou_range(0.1, 0.9, 9),
}
"""The thresholds that papers report, by data set."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationConfig:
    """Rules and thresholds of the score."""

    protocol: ProtocolName = "opentad"
    """whose rules count, where the public evaluators differ"""
    tiou_thresholds: tuple[float, ...] = TIOU_THRESHOLDS["thumos14"]
    """a detection is right if its temporal IoU with a free true action is at least this; mAP is averaged over them"""
    blocked_videos: Path | None = None
    """video ids that are not scored, such as ActivityNet's blocked ones: a JSON list, or a text file with one a line"""

    def __post_init__(self) -> None:
        try:
            check_thresholds(self.tiou_thresholds)
        except ValueError as error:
            raise ValueError(f"evaluation.{error}") from None


def check_thresholds(tiou_thresholds: Sequence[float]) -> np.ndarray:
    """(T,) float64; ValueError unless there is at least one, all are in (0, 1], and tables can tell them apart."""
    thresholds = np.asarray(tiou_thresholds, dtype=np.float64)
    # Above 0: at 0, every prediction of a video would match each of its truths.
    if thresholds.ndim != 1 or not thresholds.size or not ((thresholds > 0) & (thresholds <= 1)).all():
        raise ValueError(f"tiou_thresholds is {tiou_thresholds}; give at least one number in (0, 1]")
    # Twice, one would weigh double in the average.
    if len(set(names := threshold_names(tiou_thresholds))) < len(names):
        raise ValueError(f"tiou_thresholds is {tiou_thresholds}; give each once, to four digits")
    return thresholds


def _same(a: Action, b: Action) -> bool:
    return (
        a.label == b.label
        and abs(a.start_seconds - b.start_seconds) <= DUPLICATE_SECONDS
        and abs(a.end_seconds - b.end_seconds) <= DUPLICATE_SECONDS
    )
