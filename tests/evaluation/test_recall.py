"""AR@AN on cases that can be worked by hand."""

from __future__ import annotations

import json

import pytest
import torch

from re2tal.evaluation.recall import RecallReport, average_recall, top_kx_recall
from re2tal.structures import Action, Detections, VideoRecord


def record(video_id: str, *segments: tuple[float, float]) -> VideoRecord:
    return VideoRecord(video_id, "validation", 100.0, tuple(Action(*segment, "jump") for segment in segments))


def proposed(*rows: tuple[float, float, float]) -> Detections:
    table = torch.tensor(rows, dtype=torch.float64).reshape(-1, 3)
    return Detections(table[:, :2], table[:, 2], torch.zeros(len(rows), dtype=torch.int64))


def recall(
    predictions: dict[str, Detections], *truths: VideoRecord, number: int, protocol: str = "opentad"
) -> RecallReport:
    return average_recall(
        predictions,
        truths,
        classes=("anything",),
        protocol=protocol,
        tiou_thresholds=(0.5, 0.75),
        proposals_per_video=number,
    )


def test_recall_grows_with_the_number_of_proposals() -> None:
    # 1 proposal: [0, 6] reaches [0, 10] at 0.5 only; 2 proposals: [20, 30] is found at both.
    predictions = {"a": proposed((20, 30, 0.5), (0, 6, 0.9))}
    report = recall(predictions, record("a", (0, 10), (20, 30)), number=2)
    assert report.recall.tolist() == [[0.5, 1.0], [0.0, 0.5]]
    assert report.proposals_per_video.tolist() == [1.0, 2.0]
    assert report.average_recall.tolist() == [0.25, 0.75]
    assert report.auc == pytest.approx(0.5 / 2)  # a trapezoid from 0.25 to 0.75 over 1, as a share of 2
    assert report.at(1) == 0.25
    assert report.at(1.5) == report.at(2) == 0.75


def test_one_proposal_may_find_two_truths() -> None:
    report = recall({"a": proposed((0, 10, 0.9))}, record("a", (0, 10), (0, 8)), number=1)
    assert report.recall.tolist() == [[1.0], [1.0]]


def test_official_takes_a_hundred_points() -> None:
    predictions = {"a": proposed(*((0, 10, 0.9 - 0.01 * n) for n in range(20)))}
    report = recall(predictions, record("a", (0, 10)), number=10, protocol="official")
    assert report.recall.shape == (2, 100)
    assert report.proposals_per_video[-1] == pytest.approx(10)


def test_a_video_without_proposals_is_not_recalled() -> None:
    report = recall({"a": proposed((0, 10, 0.9))}, record("a", (0, 10)), record("b", (0, 10)), number=1)
    assert report.recall[:, -1].tolist() == [0.5, 0.5]


@pytest.mark.parametrize("predictions", [{}, {"a": proposed()}, {"elsewhere": proposed((0, 10, 0.9))}])
def test_without_proposals_recall_is_zero(predictions: dict[str, Detections]) -> None:
    report = recall(predictions, record("a", (0, 10)), number=5)
    assert report.auc == 0.0
    assert report.at(5) == 0.0
    assert report.proposals_per_video.tolist() == [1, 2, 3, 4, 5]


def test_an_empty_proposal_does_not_find_an_empty_truth() -> None:
    report = recall({"a": proposed((3, 3, 0.9))}, record("a", (3, 3)), number=1, protocol="official")
    assert report.recall.max() == 0.0


def test_the_report_survives_json() -> None:
    report = recall({"a": proposed((0, 10, 0.9))}, record("a", (0, 10)), number=1)
    assert json.loads(json.dumps(report.to_json())) == {
        "protocol": "opentad",
        "auc": 0.0,  # a curve of one point has no area
        "average_recall": [1.0],
        "proposals_per_video": [1.0],
    }


def test_points_beyond_the_curve_and_no_proposals_are_refused() -> None:
    predictions, truth = {"a": proposed((0, 10, 0.9))}, record("a", (0, 10))
    with pytest.raises(ValueError, match="AR@50 was asked, the curve ends at 2 proposals"):
        recall(predictions, truth, number=2).at(50)
    with pytest.raises(ValueError, match="proposals_per_video is 0; give at least 1"):
        recall(predictions, truth, number=0)


@pytest.mark.parametrize("protocol", ["official", "opentad"])
def test_recall_at_kx_counts_what_reaches_the_tiou_exactly_and_no_empty_pair(protocol: str) -> None:
    # 2 of 4 s shared: tIoU 0.5. The empty action lies elsewhere, and only the official protocol keeps it.
    truths = [VideoRecord("a", "validation", 9.0, (Action(0.0, 4.0, "jump"), Action(7.0, 7.0, "jump")))]
    found = {"a": Detections(torch.tensor([[0.0, 2.0], [8.0, 8.0]]), torch.tensor([0.9, 0.8]), torch.tensor([0, 0]))}
    recall = top_kx_recall(
        found, truths, classes=("jump",), protocol=protocol, tiou_thresholds=(0.5, 0.6), top_k=(1, 5)
    )
    assert recall.tolist() == [[0.5, 0.5] if protocol == "official" else [1.0, 1.0], [0.0, 0.0]]
