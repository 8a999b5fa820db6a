"""Scores on random data of many shapes against loops written from the published descriptions, in plain NumPy.

The reference vectors have a few settings; these have other thresholds, numbers of classes and videos, empty videos,
equal scores, segments that touch or coincide, and limits that bite.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from re2tal.evaluation.average_precision import mean_average_precision
from re2tal.evaluation.error_analysis import ERRORS, analyse_errors
from re2tal.evaluation.matching import match_predictions
from re2tal.evaluation.recall import average_recall, top_kx_recall
from re2tal.structures import Action, Detections, VideoRecord

SHAPES = [
    # videos, classes, truths a video at most, predictions a video at most, are scores equal now and then
    (1, 1, 1, 3, False),
    (6, 1, 4, 30, True),
    (12, 7, 5, 40, True),
    (25, 3, 9, 12, False),
    (9, 40, 3, 60, True),
]
DISTINCT = [(*one[:4], False) for one in SHAPES]


class Row(NamedTuple):
    video: str
    start: float
    end: float
    label: str
    score: float = 0.0


class Case(NamedTuple):
    truths: list[Row]
    found: list[Row]
    records: list[VideoRecord]
    predictions: dict[str, Detections]
    classes: tuple[str, ...]
    durations: dict[str, float]


def case(shape: tuple[int, int, int, int, bool], seed: int) -> Case:
    """Times have one decimal, so that overlaps meet thresholds exactly; some videos have no truth or no prediction."""
    num_videos, num_classes, most_truths, most_found, ties = shape
    random = np.random.default_rng(seed)
    classes = tuple(f"class{number}" for number in range(num_classes))
    truths, found, durations = [], [], {}
    for number in range(num_videos):
        video = f"video{number}"
        durations[video] = 60.0
        for _ in range(random.integers(0 if number else 1, most_truths + 1)):
            start = round(float(random.uniform(0, 50)), 1)
            truths.append(
                Row(
                    video,
                    start,
                    round(start + float(random.uniform(0.1, 10)), 1),
                    classes[random.integers(num_classes)],
                )
            )
        for _ in range(random.integers(0, most_found + 1)):
            near = [one for one in truths if one.video == video]
            if near and random.random() < 0.7:
                one = near[random.integers(len(near))]
                start, end = (round(time + float(random.normal(0, 0.8)), 1) for time in (one.start, one.end))
                label = one.label if random.random() < 0.8 else classes[random.integers(num_classes)]
            else:
                start = round(float(random.uniform(0, 50)), 1)
                end, label = round(start + float(random.uniform(0, 9)), 1), classes[random.integers(num_classes)]
            score = float(random.random())
            found.append(Row(video, start, end, label, round(score, 1) if ties else score))
    found.append(Row("elsewhere", 0.0, 5.0, classes[0], 0.55))
    found.append(Row(truths[0].video, truths[0].start, truths[0].end, truths[0].label, 0.45))
    return assembled(truths, found, classes, durations)


def assembled(
    truths: Sequence[Row], found: Sequence[Row], classes: tuple[str, ...], durations: dict[str, float]
) -> Case:
    """The rows, and the same as records and predictions; both in the order of their videos."""
    records = [
        VideoRecord(
            video,
            "validation",
            duration,
            tuple(Action(one.start, one.end, one.label) for one in truths if one.video == video),
        )
        for video, duration in durations.items()
    ]
    by_video: dict[str, list[Row]] = defaultdict(list)
    for one in found:
        by_video[one.video].append(one)
    predictions = {
        video: Detections(
            torch.tensor([[one.start, one.end] for one in rows], dtype=torch.float64),
            torch.tensor([one.score for one in rows], dtype=torch.float64),
            torch.tensor([classes.index(one.label) for one in rows]),
        )
        for video, rows in by_video.items()
    }
    ordered = [one for video in predictions for one in by_video[video]]
    truths = [one for video in durations for one in truths if one.video == video]
    return Case(truths, ordered, records, predictions, classes, durations)


def tiou(one: Row, other: Row, *, official: bool = False) -> float:
    overlap = max(0.0, min(one.end, other.end) - max(one.start, other.start))
    union = (one.end - one.start) + (other.end - other.start) - overlap
    if official:
        return overlap / union if union else np.inf  # 0 / 0 is NaN there, which no threshold is above
    return overlap / max(union, 1e-8)


def without_repeats(truths: Sequence[Row]) -> list[Row]:
    """As OpenTAD counts them: none that is empty, and none within 1e-3 s of an earlier one of its label and video."""
    kept: list[Row] = []
    for one in truths:
        twins = [
            other
            for other in kept
            if (other.video, other.label) == (one.video, one.label)
            and abs(other.start - one.start) <= 1e-3
            and abs(other.end - one.end) <= 1e-3
        ]
        if one.end > one.start and not twins:
            kept.append(one)
    return kept


def ranked(found: Sequence[Row]) -> list[Row]:
    return sorted(found, key=lambda one: -one.score)  # stable


def hits(found: Sequence[Row], truths: Sequence[Row], threshold: float, *, official: bool = False) -> list[int]:
    """The truth that each takes, in their order, or -1."""
    free, taken = [True] * len(truths), []
    for one in found:
        overlaps = [tiou(one, truth, official=official) if truth.video == one.video else -np.inf for truth in truths]
        best = -1
        # Of truths overlapped equally, the later one.
        for place in sorted(range(len(truths)), key=lambda place: (-overlaps[place], -place)):
            if overlaps[place] < threshold:
                break
            if free[place]:
                free[place], best = False, place
                break
        taken.append(best)
    return taken


def interpolated(correct: Sequence[bool], num_truths: int) -> float:
    precision = [0.0, *(sum(correct[: n + 1]) / (n + 1) for n in range(len(correct))), 0.0]
    recall = [0.0, *(sum(correct[: n + 1]) / num_truths for n in range(len(correct))), 1.0]
    for place in range(len(precision) - 2, -1, -1):
        precision[place] = max(precision[place], precision[place + 1])
    return sum((recall[n] - recall[n - 1]) * precision[n] for n in range(1, len(recall)) if recall[n] != recall[n - 1])


def with_odd_ones(given: Case) -> Case:
    """Times are whole; truths stand there twice, every other time empty; some predictions are empty or reversed."""
    whole = [one._replace(start=round(one.start), end=round(one.end)) for one in (*given.truths, *given.found)]
    truths, found = whole[: len(given.truths)], whole[len(given.truths) :]
    again = [one._replace(end=one.start) if place % 2 else one for place, one in enumerate(truths)]
    found[::5] = [one._replace(end=one.start) for one in found[::5]]
    found[1::5] = [one._replace(end=2 * one.start - one.end) for one in found[1::5]]
    known = {one.label for one in truths}
    return assembled([*truths, *again], [one for one in found if one.label in known], given.classes, given.durations)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(("protocol", "odd"), [("opentad", False), ("opentad", True), ("official", True)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_average_precision(shape: tuple[int, int, int, int, bool], protocol: str, odd: bool, seed: int) -> None:
    given = with_odd_ones(case(shape, seed)) if odd else case(shape, seed)
    thresholds, official = (0.05, 0.25, 0.5, 2 / 3, 1.0), protocol == "official"
    truths = list(given.truths) if official else without_repeats(given.truths)
    report = mean_average_precision(
        match_predictions(
            given.predictions, given.records, classes=given.classes, protocol=protocol, tiou_thresholds=thresholds
        )
    )
    assert list(report.classes) == list(dict.fromkeys(one.label for one in truths))
    for column, label in zip(report.average_precision.T, report.classes, strict=True):
        own = [one for one in truths if one.label == label]
        found = ranked([one for one in given.found if one.label == label])
        wanted = [
            interpolated([place >= 0 for place in hits(found, own, threshold, official=official)], len(own))
            for threshold in thresholds
        ]
        np.testing.assert_allclose(column, wanted, rtol=0, atol=1e-9)


@pytest.mark.parametrize("number", [1, 7, 100])
@pytest.mark.parametrize("protocol", ["official", "opentad"])
@pytest.mark.parametrize("shape", DISTINCT, ids=str)
def test_average_recall(shape: tuple[int, int, int, int, bool], protocol: str, number: int) -> None:
    given = case(shape, 3)
    truths = without_repeats(given.truths) if protocol == "opentad" else given.truths
    report = average_recall(
        given.predictions, given.records, classes=given.classes, protocol=protocol, proposals_per_video=number
    )
    videos = list(dict.fromkeys(one.video for one in truths))
    share = number * float(len(videos)) / len(given.found)
    best = {video: ranked([one for one in given.found if one.video == video]) for video in videos}
    best = {video: rows[: int(len(rows) * share)] for video, rows in best.items()}
    total = sum(map(len, best.values()))
    points = 100 if protocol == "official" else number
    recall = np.zeros((10, points))
    for place in range(points):
        for row, threshold in enumerate(np.linspace(0.5, 0.95, 10)):
            for video, rows in best.items():
                part = (place + 1) / points * (number * float(len(videos)) / total) if total else 0.0
                kept = rows[: min(int(len(rows) * part), len(rows))]
                own = [one for one in truths if one.video == video]
                recall[row, place] += sum(any(tiou(one, truth) >= threshold for one in kept) for truth in own)
    np.testing.assert_allclose(report.recall, recall / len(truths), rtol=0, atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_recall_of_the_best_k_times_as_many(shape: tuple[int, int, int, int, bool]) -> None:
    given, thresholds, ks = case(shape, 5), (0.3, 0.5), (1, 3)
    truths = without_repeats(given.truths)
    ours = top_kx_recall(
        given.predictions,
        given.records,
        classes=given.classes,
        protocol="opentad",
        tiou_thresholds=thresholds,
        top_k=ks,
    )
    labels = list(dict.fromkeys(one.label for one in truths))
    for row, threshold in enumerate(thresholds):
        for column, k in enumerate(ks):
            of_class = []
            for label in labels:
                own, seen = [one for one in truths if one.label == label], 0
                for video in {one.video for one in own}:
                    there = [one for one in own if one.video == video]
                    found = ranked([one for one in given.found if (one.video, one.label) == (video, label)])
                    kept = found[: k * len(there)]
                    seen += sum(any(tiou(one, truth) >= threshold for one in kept) for truth in there)
                of_class.append(seen / len(own))
            assert ours[row, column] == pytest.approx(np.mean(of_class), abs=1e-9)


def normalised(correct: Sequence[bool], num_truths: int, mean: float, least: float = 0.0) -> tuple[float, list[bool]]:
    """DETAD's AP, and which hits lie at a precision above `least`."""
    precision, hit, miss = [], 0, 0
    for one in correct:
        hit, miss = hit + one, miss + (not one)
        weight = hit / num_truths * mean
        precision.append(weight / (weight + miss))
    kept = [one and value > least for one, value in zip(correct, precision, strict=True)]
    total = sum(max(precision[place:]) for place, one in enumerate(correct) if one)
    return total / num_truths, kept


@pytest.mark.parametrize("per_action", [1, 2, 10])
@pytest.mark.parametrize("shape", DISTINCT, ids=str)
def test_error_types_costs_and_missed_actions(shape: tuple[int, int, int, int, bool], per_action: int) -> None:
    given, thresholds = case(shape, 7), (0.3, 0.5, 0.75)
    report = analyse_errors(
        given.predictions,
        given.records,
        classes=given.classes,
        tiou_thresholds=thresholds,
        sizes_of="thumos14",
        per_action=per_action,
    )
    truths, labels = given.truths, report.classes
    counts = {label: sum(one.label == label for one in truths) for label in labels}
    mean = len(truths) / len(labels)
    types: list[Any] = [[] for _ in thresholds]
    missed = np.ones((len(thresholds), len(truths)), dtype=bool)
    for column, label in enumerate(labels):
        own = [one for one in truths if one.label == label]
        found = ranked([one for one in given.found if one.label == label])
        best = found[: per_action * counts[label]]
        for row, threshold in enumerate(thresholds):
            taken = hits(best, own, threshold)
            kinds = [0 if place >= 0 else kind(one, truths, threshold) for one, place in zip(best, taken, strict=True)]
            types[row] += kinds
            value, _ = normalised([place >= 0 for place in taken], counts[label], mean)
            assert report.average_precision[row, column] == pytest.approx(value, abs=1e-9)
            for number, error in enumerate(ERRORS, start=1):
                rest = [place >= 0 for place, one in zip(taken, kinds, strict=True) if one != number]
                value, _ = normalised(rest, counts[label], mean)
                assert report.gains[error][row, column] == pytest.approx(value, abs=1e-9)
            places = hits(found, own, threshold)
            _, useful = normalised([place >= 0 for place in places], counts[label], mean, least=0.05)
            for place, one in zip(places, useful, strict=True):
                if one:
                    missed[row, truths.index(own[place])] = False
    assert report.types.tolist() == types
    lengths = np.array([round(one.end - one.start, 6) for one in truths])
    for size, low, high in (("XS", 0, 3), ("S", 3, 6), ("M", 6, 12)):
        chosen = (lengths > low) & (lengths <= high)
        if chosen.any():
            share, of = report.missed["length"][size]
            assert share == pytest.approx(chosen.mean())
            assert of == pytest.approx(missed[:, chosen].mean(axis=1))


def kind(one: Row, truths: Sequence[Row], threshold: float) -> int:
    """Number of the error of a prediction that takes no truth."""
    near = [(tiou(one, truth), -place) for place, truth in enumerate(truths) if truth.video == one.video]
    overlap, place = max(near, default=(0.0, 0))
    if not near or overlap < 0.1:
        return 5
    same = truths[-place].label == one.label
    if overlap >= threshold:
        return 1 if same else 2
    return 3 if same else 4
