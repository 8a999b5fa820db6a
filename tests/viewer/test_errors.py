"""Types of predictions, video by video, against DETAD's analysis of all videos at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from re2tal.evaluation.error_analysis import analyse_errors
from re2tal.structures import AMBIGUOUS, Action, Detections, VideoRecord
from re2tal.viewer.errors import TYPES, type_predictions

CLASSES = ("a", "b", "c")


def detections(rows: list[tuple[float, float, float, int]]) -> Detections:
    columns = np.array(rows, dtype=np.float64).reshape(-1, 4)
    return Detections(
        torch.from_numpy(columns[:, :2].copy()),
        torch.from_numpy(columns[:, 2].copy()),
        torch.from_numpy(columns[:, 3].astype(np.int64)),
    )


def random_videos(seed: int) -> tuple[dict[str, Detections], list[VideoRecord]]:
    random = np.random.default_rng(seed)
    found, records = {}, []
    for number in range(6):
        starts = random.uniform(0, 50, 5)
        actions = tuple(
            Action(start, start + length, CLASSES[label])
            for start, length, label in zip(starts, random.uniform(2, 9, 5), random.integers(0, 3, 5), strict=True)
        )
        rows = [
            (one.start_seconds + shift, one.end_seconds + shift, score, int(random.integers(0, 3)))
            for one in actions * 6
            for shift, score in [(random.normal(0, 2), random.uniform())]
        ]
        found[f"v{number}"] = detections(rows)
        records.append(VideoRecord(f"v{number}", "validation", 60.0, actions))
    return found, records


@pytest.mark.parametrize("tiou", [0.3, 0.5, 0.7])
def test_types_are_those_of_the_error_analysis(tiou: float) -> None:
    found, records = random_videos(seed=3)
    report = analyse_errors(
        found, records, classes=CLASSES, tiou_thresholds=(tiou,), sizes_of="thumos14", per_action=10_000
    )
    rows = []
    for record in records:
        one = found[record.video_id]
        types = type_predictions(one, record.actions, classes=CLASSES, tiou=tiou).types
        rows += list(zip(one.labels.tolist(), one.scores.tolist(), types, strict=True))
    order = [CLASSES.index(name) for name in report.classes]
    expected = [
        of for label in order for _, _, of in sorted((row for row in rows if row[0] == label), key=lambda r: -r[1])
    ]
    assert report.types[0].tolist() == expected
    assert len(set(expected)) == len(TYPES)


def test_a_case_worked_by_hand() -> None:
    actions = (Action(0, 10, "a"), Action(20, 30, "b"), Action(40, 50, "a"), Action(60, 70, AMBIGUOUS))
    found = detections(
        [
            (0, 9, 0.9, 0),  # takes the first a
            (0, 10, 0.8, 0),  # too late, though it overlaps more
            (20, 30, 0.7, 0),  # b is called a
            (5, 14, 0.6, 0),  # 5 of 14 seconds in common
            (26, 36, 0.5, 2),  # 4 of 16, and of another class
            (60, 70, 0.4, 0),  # "Ambiguous" is no truth
        ]
    )
    typed = type_predictions(found, actions, classes=CLASSES, tiou=0.5)
    names = [TYPES[of] for of in typed.types]
    assert names == [
        "true positive", "double detection", "wrong label", "localization", "confusion", "background"
    ]  # fmt: skip
    assert typed.missed == [False, True, True, False]
    assert typed.counts()["missed"] == 2


def test_what_ends_before_it_starts_takes_no_action() -> None:
    found = detections([(12, 10, 0.9, 0), (7, 5, 0.8, 0), (10, 12, 0.7, 0)])
    typed = type_predictions(found, (Action(10, 12, "a"),), classes=CLASSES, tiou=0.5)
    assert [TYPES[of] for of in typed.types] == ["background", "background", "true positive"]


def test_without_truth_all_is_background_and_without_predictions_all_is_missed() -> None:
    assert type_predictions(detections([(0, 1, 1, 0)]), (), classes=CLASSES, tiou=0.5).types == [5]
    assert type_predictions(detections([]), (Action(0, 1, "a"),), classes=CLASSES, tiou=0.5).missed == [True]
