"""Where a detector's mAP is lost: DETAD's three analyses (Alwassel et al., ECCV 2018), with its numbers.

    false positives   the type of each wrong prediction, and how much AP grows without each type
    sensitivity       AP on actions of one length, coverage or crowd alone
    false negatives   the share of these actions that no prediction finds

AP is normalised: precision = R N / (R N + FP) with recall R, and N the mean number of true actions of a class, so that
rare and frequent classes compare. Empty truths and those longer than their video are dropped. Lengths and shares are
rounded to 1e-6, as in its own files: 0.3 - 0.2 is not to be longer than 0.1.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from re2tal.evaluation.average_precision import area_under
from re2tal.evaluation.coverage import name_some
from re2tal.evaluation.instances import Predictions, Truths, flatten_predictions, flatten_truths, ranked_by
from re2tal.evaluation.matching import partners_by_class
from re2tal.evaluation.protocols import OFFICIAL, check_thresholds
from re2tal.structures import Detections, VideoRecord
from re2tal.tables import text_table

ERRORS = ("double detection", "wrong label", "localization", "confusion", "background")
TRUE_POSITIVE = "true positive"
BACKGROUND_TIOU = 0.1
MIN_PRECISION_OF_FOUND = 0.05
"""Of the analysis of false negatives: an action that is found only at a lower precision counts as missed."""

DECIMALS = 6
_SIZES = ("XS", "S", "M", "L", "XL")
_THUMOS14 = ((0, 0.02, 0.04, 0.06, 0.08, 1), (0, 3, 6, 12, 18, np.inf), (-1, 1, 40, 80, np.inf))
_ACTIVITYNET = ((0, 0.2, 0.4, 0.6, 0.8, 1), (0, 30, 60, 120, 180, np.inf), (-1, 1, 4, 8, np.inf))
CHARACTERISTICS = ("coverage", "length", "num-instances")
"""The share of its video that an action takes, its seconds, and the number of actions in its video."""


@dataclass(frozen=True, slots=True)
class ErrorReport:
    """The three analyses; `str()` is tables in percent."""

    tiou_thresholds: tuple[float, ...]
    classes: tuple[str, ...]
    average_precision: np.ndarray
    """(T, K), normalised, of the predictions that the analysis of false positives keeps"""
    types: np.ndarray
    """(T, P) of these P predictions, class by class and best first: 0 is right, 1 to 5 are ERRORS"""
    profile: tuple[np.ndarray, ...]
    """One for each G predictions of a class with G true actions, best first: (T, 6) how many are of each type"""
    gains: Mapping[str, np.ndarray]
    """Error -> (T, K) normalised AP without the predictions that make it"""
    all_average_precision: np.ndarray
    """(T, K), normalised, of all predictions"""
    sensitivity: Mapping[str, Mapping[str, float]]
    """Characteristic -> size -> normalised mAP on the actions of that size"""
    missed: Mapping[str, Mapping[str, tuple[float, np.ndarray]]]
    """Characteristic, or two joined by "|" -> size -> (share of all actions, (T,) share of them that is missed)"""
    without_duration: tuple[str, ...] = ()
    """Videos whose length is not known: where there is one, nothing is said of coverage"""

    @property
    def gain(self) -> dict[str, float]:
        """Error -> how much the normalised mAP grows without it."""
        base = self.average_precision.mean()
        return {error: float(values.mean() - base) for error, values in self.gains.items()}

    def to_json(self) -> dict[str, Any]:
        """The figures, in types that `json` writes."""
        return {
            "tiou_thresholds": list(self.tiou_thresholds),
            "average_map_normalized": float(self.average_precision.mean()),
            "counts": [dict(zip((TRUE_POSITIVE, *ERRORS), row, strict=True)) for row in _count(self.types).tolist()],
            "gain": self.gain,
            "sensitivity": {"average_map_normalized": float(self.all_average_precision.mean()), **self.sensitivity},
            "missed": {
                name: {size: {"share": share, "missed": float(of.mean())} for size, (share, of) in sizes.items()}
                for name, sizes in self.missed.items()
            },
            "without_duration": list(self.without_duration),
        }

    def __str__(self) -> str:
        shares = (_count(self.types) / max(self.types.shape[1], 1)).mean(axis=0)
        errors = [("prediction", "share", "mAP without it")] + [
            (name, f"{100 * share:.2f}", f"{100 * self.gain[name]:+.2f}" if name in self.gain else "")
            for name, share in zip((TRUE_POSITIVE, *ERRORS), shares, strict=True)
        ]
        sizes = [("true actions", "size", "share", "mAP", "missed")] + [
            (name, size, *(f"{100 * value:.2f}" for value in (share, self.sensitivity[name][size], of.mean())))
            for name in self.sensitivity
            for size, (share, of) in self.missed[name].items()
        ]
        mean = f"normalised mAP {100 * self.average_precision.mean():.2f}, in %, means over tIoU"
        tables = [mean, text_table(errors, align="<>", rules=(1,)), "", text_table(sizes, align="<<>", rules=(1,))]
        if self.without_duration:
            tables.append(
                f"note: coverage is left out: the annotations do not give the duration of {len(self.without_duration)} "
                f"videos: {name_some(self.without_duration)}"
            )
        return "\n".join(tables)


def analyse_errors(
    predictions: Mapping[str, Detections],
    ground_truth: Sequence[VideoRecord],
    *,
    classes: Sequence[str],
    tiou_thresholds: Sequence[float],
    sizes_of: Literal["activitynet", "thumos14"],
    per_action: int = 10,
    blocked_videos: Collection[str] = (),
    without_duration: Collection[str] = (),
) -> ErrorReport:
    """Diagnose `predictions` as DETAD does; arguments and errors as `match_predictions`.

    `sizes_of`: the data set whose limits between short and long, and so on, are taken. The analysis of false positives
    keeps, of each class, the best `per_action` times as many predictions as it has true actions.
    `without_duration`: videos whose records hold a stand-in. Nothing is then said of coverage, the share of a video.
    """
    thresholds = check_thresholds(tiou_thresholds)
    videos = [_without_odd_actions(video, is_known=video.video_id not in without_duration) for video in ground_truth]
    truths = flatten_truths(videos, protocol=OFFICIAL, blocked_videos=blocked_videos)
    flat = flatten_predictions(predictions, truths, classes=classes, blocked_videos=blocked_videos)
    ranked = ranked_by(flat.labels, flat.scores, num=len(truths.classes))
    counts = np.bincount(truths.labels)
    best = [rows[: count * per_action] for rows, count in zip(ranked, counts, strict=True)]
    everything, limited = (
        # DETAD builds on ActivityNet's own evaluator.
        _Scores(truths, partners_by_class(flat, truths, rows, protocol=OFFICIAL, thresholds=thresholds), counts)
        for rows in (ranked, best)
    )
    types = [
        _types(flat, truths, rows, partners, thresholds) for rows, partners in zip(best, limited.partners, strict=True)
    ]
    sizes = _sizes(truths, videos, _THUMOS14 if sizes_of == "thumos14" else _ACTIVITYNET)
    undated = tuple(video_id for video_id in truths.video_ids if video_id in without_duration)
    if undated:
        del sizes["coverage"]
    return ErrorReport(
        tiou_thresholds=tuple(thresholds.tolist()),
        classes=truths.classes,
        average_precision=limited.average_precision(),
        types=np.concatenate(types, axis=1),
        profile=_profile(types, counts, num_groups=per_action),
        gains={error: limited.without(number, types) for number, error in enumerate(ERRORS, start=1)},
        all_average_precision=everything.average_precision(),
        sensitivity={
            name: {size: everything.sensitivity(of == size) for size in _SIZES if (of == size).any()}
            for name, of in sizes.items()
        },
        missed=_missed(everything, sizes),
        without_duration=undated,
    )


def _without_odd_actions(video: VideoRecord, *, is_known: bool) -> VideoRecord:
    """Without empty actions, and those that are longer than their video, where its duration `is_known`."""
    lengths = [(one, round(one.end_seconds - one.start_seconds, DECIMALS)) for one in video.actions]
    # An action that fills its video may be longer than it by a rounding error of its two times.
    longest = round(video.duration_seconds, DECIMALS) if is_known else np.inf
    return replace(video, actions=tuple(one for one, length in lengths if 0 < length <= longest))


def _profile(types: Sequence[np.ndarray], counts: np.ndarray, *, num_groups: int) -> tuple[np.ndarray, ...]:
    """By group of as many predictions of a class as it has true actions: (T, 6) how many are of each type."""
    by_class = list(zip(types, counts.tolist(), strict=True))
    return tuple(
        _count(np.concatenate([of[:, group * count : (group + 1) * count] for of, count in by_class], axis=1))
        for group in range(num_groups)
    )


@dataclass(frozen=True, slots=True)
class _Scores:
    """Predictions of each class, best first, against the truths of that class."""

    truths: Truths
    partners: list[np.ndarray]
    """(T, n) by class: the truth that a prediction takes, or -1"""
    counts: np.ndarray
    """(K,) true actions of each class"""

    def average_precision(self) -> np.ndarray:
        """(T, K) normalised AP."""
        columns = [
            self._average_precision(of_class >= 0, count)
            for of_class, count in zip(self.partners, self.counts, strict=True)
        ]
        return np.stack(columns, axis=1)

    def without(self, error: int, types: Sequence[np.ndarray]) -> np.ndarray:
        """(T, K) normalised AP without the predictions whose type, by class (T, n), is that error."""
        columns = [
            [
                self._average_precision(row[kept][None] >= 0, count)[0]
                for row, kept in zip(partners, of != error, strict=True)
            ]
            for partners, of, count in zip(self.partners, types, self.counts, strict=True)
        ]
        return np.array(columns).T

    def sensitivity(self, chosen: np.ndarray) -> float:
        """Normalised mAP on the (M,) chosen truths alone, and the predictions that take one of them, or none at all.

        A prediction that takes another truth at one threshold is left out at all of them, as DETAD does.
        """
        counts = np.bincount(self.truths.labels[chosen], minlength=len(self.counts))
        values = [
            self._average_precision(partners[:, ((partners < 0) | chosen[partners]).all(axis=0)] >= 0, count)
            for partners, count in zip(self.partners, counts, strict=True)
            if count
        ]
        return float(np.mean(values))

    def missed(self) -> np.ndarray:
        """(T, M) bool: truths that no prediction finds at a precision worth having."""
        missed = np.ones((len(self.partners[0]), len(self.truths.labels)), dtype=bool)
        for partners, count in zip(self.partners, self.counts, strict=True):
            useful = self._precision(partners >= 0, count) > MIN_PRECISION_OF_FOUND
            for of, found, stays in zip(missed, partners, useful, strict=True):
                of[found[stays & (found >= 0)]] = False
        return missed

    def _average_precision(self, true_positive: np.ndarray, num_truths: int) -> np.ndarray:
        """(T, n) by falling score -> (T,) area under the envelope of the normalised precision."""
        return area_under(self._precision(true_positive, num_truths), true_positive, num_truths=num_truths)

    def _precision(self, true_positive: np.ndarray, num_truths: int) -> np.ndarray:
        """(T, n) by falling score -> (T, n) normalised precision."""
        weighted = np.cumsum(true_positive, axis=1) / num_truths * self.counts.mean()
        false = np.cumsum(~true_positive, axis=1)
        # The larger of that and the smallest float: before the first prediction counts, 0 / 0 is 0.
        return weighted / np.maximum(weighted + false, np.finfo(np.float64).tiny)


def _types(
    flat: Predictions, truths: Truths, rows: np.ndarray, partners: np.ndarray, thresholds: np.ndarray
) -> np.ndarray:
    """(T, n) 0 where a prediction is right, else 1 + the index of its error."""
    types = np.full(partners.shape, 1 + ERRORS.index("background"))
    first = np.searchsorted(truths.videos, flat.videos[rows], side="left")
    last = np.searchsorted(truths.videos, flat.videos[rows], side="right")
    places = np.repeat(np.arange(len(rows)), last - first)
    begins = np.cumsum(last - first) - (last - first)
    others = np.arange(len(places)) - begins[places] + first[places]
    overlaps = OFFICIAL.tiou(flat.segments[rows[places]], truths.segments[others])
    # Of truths overlapped equally, the first one counts.
    order = np.lexsort((-overlaps, places))
    near, chosen = np.unique(places[order], return_index=True)
    nearest, best = others[order][chosen], overlaps[order][chosen]
    same = truths.labels[nearest] == flat.labels[rows[near]]
    close = best >= BACKGROUND_TIOU
    types[:, near[close]] = np.where(same[close], 3, 4)
    reached = best >= thresholds[:, None]
    # In this order: an overlap that reaches the threshold outweighs one that is merely close, and a match outweighs
    # all.
    types[:, near] = np.where(reached, np.where(same, 1, 2), types[:, near])
    types[partners >= 0] = 0
    return types


def _count(types: np.ndarray) -> np.ndarray:
    """(T, n) -> (T, 6) how many predictions are of each type."""
    return np.stack([np.bincount(row, minlength=1 + len(ERRORS)) for row in types])


def _sizes(truths: Truths, records: Sequence[VideoRecord], edges: Sequence[Sequence[float]]) -> dict[str, np.ndarray]:
    """Characteristic -> (M,) size of each truth; intervals are closed on the right, the first one on both sides."""
    duration = {record.video_id: record.duration_seconds for record in records}
    length = truths.segments[:, 1] - truths.segments[:, 0]
    of_video = np.array([duration[truths.video_ids[video]] for video in truths.videos])
    crowd = Counter(truths.videos.tolist())
    shares, lengths = (np.round(value, DECIMALS) for value in (length / of_video, length))
    values = (shares, lengths, np.array([crowd[video] for video in truths.videos.tolist()]))
    return {
        name: np.array(_SIZES)[np.searchsorted(bounds[1:-1], value, side="left")]
        for name, value, bounds in zip(CHARACTERISTICS, values, edges, strict=True)
    }


def _missed(scores: _Scores, sizes: Mapping[str, np.ndarray]) -> dict[str, dict[str, tuple[float, np.ndarray]]]:
    missed = scores.missed()
    pairs = itertools.pairwise(sizes)
    groups = dict(sizes) | {f"{a}|{b}": np.char.add(np.char.add(sizes[a], "|"), sizes[b]) for a, b in pairs}
    names = [*_SIZES, *("|".join(pair) for pair in itertools.product(_SIZES, repeat=2))]
    return {
        name: {
            size: (float((of == size).mean()), missed[:, of == size].mean(axis=1))
            for size in names
            if (of == size).any()
        }
        for name, of in groups.items()
    }
