"""Average precision on cases that can be worked by hand."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from re2tal.evaluation import matching as module
from re2tal.evaluation.average_precision import MapReport, area_under, mean_average_precision, precision_of
from re2tal.evaluation.matching import match_predictions
from re2tal.evaluation.protocols import PROTOCOLS
from re2tal.structures import Action, Detections, VideoRecord

PROTOCOL_NAMES = sorted(PROTOCOLS)
both = pytest.mark.parametrize("protocol", PROTOCOL_NAMES)


def detected(*rows: tuple[float, float, float, int]) -> Detections:
    """(start, end, score, label) rows."""
    table = torch.tensor(rows, dtype=torch.float64).reshape(-1, 4)
    return Detections(table[:, :2], table[:, 2], table[:, 3].long())


def record(video_id: str, *actions: tuple[float, float, str]) -> VideoRecord:
    return VideoRecord(video_id, "validation", 100.0, tuple(Action(*action) for action in actions))


def score(
    predictions: dict[str, Detections],
    *ground_truth: VideoRecord,
    protocol: str = "opentad",
    thresholds: tuple[float, ...] = (0.5,),
    classes: tuple[str, ...] = ("jump", "run"),
    blocked_videos: tuple[str, ...] = (),
) -> MapReport:
    return mean_average_precision(
        match_predictions(
            predictions,
            ground_truth,
            classes=classes,
            protocol=protocol,
            tiou_thresholds=thresholds,
            blocked_videos=blocked_videos,
        )
    )


@both
def test_perfect_detections_score_one(protocol: str) -> None:
    report = score(
        {"a": detected((0, 10, 0.9, 0)), "b": detected((5, 6, 0.2, 1))},
        record("a", (0, 10, "jump")),
        record("b", (5, 6, "run")),
        protocol=protocol,
        thresholds=(0.5, 1.0),
    )
    assert report.average_map == 1.0
    assert report.map_by_tiou == {"0.5": 1.0, "1": 1.0}


@both
def test_precision_is_the_envelope_over_recall(protocol: str) -> None:
    # By score: right, wrong, right; 2 truths. Precisions at the hits: 1/1 and 2/3, each for half of the recall.
    report = score(
        {"a": detected((0, 10, 0.9, 0), (40, 50, 0.8, 0), (20, 30, 0.7, 0))},
        record("a", (0, 10, "jump"), (20, 30, "jump")),
        protocol=protocol,
    )
    assert report.average_map == pytest.approx((1 + 2 / 3) / 2, abs=1e-12)


@both
def test_later_higher_precision_counts_for_earlier_recall(protocol: str) -> None:
    # wrong, right, right: precisions 1/2, 2/3; the envelope lifts the first to 2/3.
    report = score(
        {"a": detected((40, 50, 0.9, 0), (0, 10, 0.8, 0), (20, 30, 0.7, 0))},
        record("a", (0, 10, "jump"), (20, 30, "jump")),
        protocol=protocol,
    )
    assert report.average_map == pytest.approx(2 / 3, abs=1e-12)


@both
def test_a_second_prediction_on_one_truth_is_wrong(protocol: str) -> None:
    # right, wrong (taken), right: as above, (1 + 2/3) / 2.
    report = score(
        {"a": detected((0, 10, 0.9, 0), (0, 9, 0.8, 0), (20, 30, 0.7, 0))},
        record("a", (0, 10, "jump"), (20, 30, "jump")),
        protocol=protocol,
    )
    assert report.average_map == pytest.approx((1 + 2 / 3) / 2, abs=1e-12)


@both
def test_a_prediction_whose_best_truth_is_taken_takes_the_second_best(protocol: str) -> None:
    # Both overlap [0, 10] most; the second reaches [1, 11] with tIoU 9/11.
    predictions = {"a": detected((0, 10, 0.9, 0), (0, 10, 0.8, 0))}
    truths = record("a", (0, 10, "jump"), (1, 11, "jump"))
    assert score(predictions, truths, protocol=protocol, thresholds=(0.8,)).average_map == 1.0
    assert score(predictions, truths, protocol=protocol, thresholds=(0.85,)).average_map == 0.5


@both
def test_each_threshold_matches_by_itself(protocol: str) -> None:
    # tIoU of the first with [0, 10] is 6/10, of the second 9/10: at 0.8 the second finds the truth still free.
    predictions = {"a": detected((0, 6, 0.9, 0), (0, 9, 0.8, 0))}
    report = score(predictions, record("a", (0, 10, "jump")), protocol=protocol, thresholds=(0.5, 0.8))
    assert report.map.tolist() == [1.0, 0.5]


@both
def test_tiou_equal_to_the_threshold_is_a_match(protocol: str) -> None:
    report = score({"a": detected((0, 5, 0.9, 0))}, record("a", (0, 10, "jump")), protocol=protocol)
    assert report.average_map == 1.0


@both
def test_equal_scores_keep_the_order_of_the_predictions(protocol: str) -> None:
    hit, miss = (0, 10, 0.5, 0), (40, 50, 0.5, 0)
    truth = record("a", (0, 10, "jump"))
    assert score({"a": detected(hit, miss)}, truth, protocol=protocol).average_map == 1.0
    assert score({"a": detected(miss, hit)}, truth, protocol=protocol).average_map == 0.5
    videos = {"z": detected(miss), "a": detected(hit)}
    assert score(videos, truth, protocol=protocol).average_map == 0.5


@both
def test_a_class_without_predictions_counts_as_zero(protocol: str) -> None:
    report = score({"a": detected((0, 10, 0.9, 0))}, record("a", (0, 10, "jump"), (0, 10, "run")), protocol=protocol)
    assert report.classes == ("jump", "run")
    assert report.average_precision.tolist() == [[1.0, 0.0]]
    assert report.average_map == 0.5


@both
def test_no_predictions_at_all_score_zero(protocol: str) -> None:
    truth = record("a", (0, 10, "jump"))
    assert score({}, truth, protocol=protocol).average_map == 0.0
    assert score({"a": detected()}, truth, protocol=protocol).average_map == 0.0


@both
def test_a_prediction_on_a_video_outside_the_subset_is_wrong(protocol: str) -> None:
    predictions = {"elsewhere": detected((0, 10, 0.9, 0)), "a": detected((0, 10, 0.8, 0))}
    assert score(predictions, record("a", (0, 10, "jump")), protocol=protocol).average_map == 0.5


@both
def test_a_prediction_on_a_video_with_only_other_classes_is_wrong(protocol: str) -> None:
    predictions = {"b": detected((0, 10, 0.9, 0)), "a": detected((0, 10, 0.8, 0))}
    report = score(predictions, record("a", (0, 10, "jump")), record("b", (0, 10, "run")), protocol=protocol)
    assert report.average_precision[0].tolist() == [0.5, 0.0]


@both
def test_blocked_videos_count_on_neither_side(protocol: str) -> None:
    predictions = {"b": detected((0, 10, 0.9, 0)), "a": detected((0, 10, 0.8, 0))}
    truths = (record("a", (0, 10, "jump")), record("b", (50, 60, "jump")))
    assert score(predictions, *truths, protocol=protocol).average_map == pytest.approx(0.25)
    report = score(predictions, *truths, protocol=protocol, blocked_videos=("b",))
    assert report.average_map == 1.0
    assert report.num_truths == (1,)
    assert report.num_predictions == (1,)


@both
def test_reversed_predictions_are_wrong_but_no_error(protocol: str) -> None:
    predictions = {"a": detected((12, 0, 0.9, 0), (0, 10, 0.8, 0))}
    assert score(predictions, record("a", (0, 10, "jump")), protocol=protocol).average_map == 0.5


def test_opentad_ignores_a_predicted_class_without_truth() -> None:
    predictions = {"a": detected((0, 10, 0.9, 1), (0, 10, 0.8, 0))}
    assert score(predictions, record("a", (0, 10, "jump"))).average_map == 1.0


def test_official_refuses_a_predicted_class_without_truth() -> None:
    predictions = {"a": detected((0, 10, 0.9, 1))}
    with pytest.raises(ValueError, match=r"video 'a' hold class 'run', which has no truth in this subset.*opentad"):
        score(predictions, record("a", (0, 10, "jump")), protocol="official")


def test_opentad_drops_repeated_and_empty_truths_and_official_keeps_them() -> None:
    truths = record("a", (0, 10, "jump"), (0.0005, 10.0005, "jump"), (0, 10, "run"), (3, 3, "jump"))
    predictions = {"a": detected((0, 10, 0.9, 0), (0, 10, 0.9, 1))}
    report = score(predictions, truths)
    assert report.num_truths == (1, 1)
    assert report.average_map == 1.0
    report = score(predictions, truths, protocol="official")
    assert report.num_truths == (3, 1)
    assert report.average_precision[0].tolist() == pytest.approx([1 / 3, 1.0])


def test_official_matches_an_empty_prediction_with_an_empty_truth_wherever_they_lie() -> None:
    # The published code divides 0 by 0, and NaN is not below the threshold.
    predictions = {"a": detected((70, 70, 0.9, 0), (5, 8, 0.8, 0))}
    truths = record("a", (3, 3, "jump"), (5, 8, "jump"))
    assert score(predictions, truths, protocol="official").average_map == 1.0
    assert score(predictions, truths, protocol="opentad").average_map == 0.5


def test_many_pairs_are_compared_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    starts = torch.rand(200, generator=generator, dtype=torch.float64) * 50
    segments = torch.stack([starts, starts + 5], dim=1)
    predictions = {"a": Detections(segments, torch.rand(200, generator=generator), torch.zeros(200, dtype=torch.int64))}
    truths = record("a", *((float(s), float(s) + 5, "jump") for s in range(0, 50, 4)))
    whole = score(predictions, truths, thresholds=(0.3, 0.6))
    monkeypatch.setattr(module, "MAX_PAIRS", 100)
    np.testing.assert_array_equal(
        whole.average_precision, score(predictions, truths, thresholds=(0.3, 0.6)).average_precision
    )
    assert 0 < whole.average_map < 1


def test_interpolation_with_one_hit_in_four_ranks() -> None:
    hits = np.array([[False, False, True, False], [True, False, False, False]])
    assert area_under(precision_of(hits), hits, num_truths=2).tolist() == pytest.approx([1 / 6, 1 / 2])


def test_a_row_of_ones_own_is_a_protocol_too() -> None:
    protocol = replace(PROTOCOLS["official"], name="strict", refuses_unknown_labels=False)
    report = mean_average_precision(
        match_predictions(
            {"a": detected((0, 10, 0.9, 1))},
            [record("a", (0, 10, "jump"))],
            classes=("jump", "run"),
            protocol=protocol,
            tiou_thresholds=(0.5,),
        )
    )
    assert report.protocol == "strict"
    assert report.average_map == 0.0


def test_the_table_shows_percent_by_class_and_threshold() -> None:
    report = score({"a": detected((0, 5, 0.9, 0))}, record("a", (0, 10, "jump"), (2, 3, "run")), thresholds=(0.5, 0.75))
    lines = str(report).splitlines()
    assert lines.pop(2) == "note: 1 of 2 classes with true actions are never predicted: 'run'"
    assert lines[0] == "AP in %, by tIoU; protocol opentad"
    assert lines[1] == "subset validation: 1 videos; no blocked list; by class"
    assert lines[2].split() == ["class", "truths", "predictions", "0.5", "0.75", "average"]
    assert lines[4].split() == ["jump", "1", "1", "100.00", "0.00", "50.00"]
    assert lines[5].split() == ["run", "1", "0", "0.00", "0.00", "0.00"]
    assert lines[-1].split() == ["mAP", "2", "1", "50.00", "0.00", "25.00"]


def test_the_report_survives_json() -> None:
    report = score({"a": detected((0, 5, 0.9, 0))}, record("a", (0, 10, "jump")), thresholds=(0.3, 0.39999999999999997))
    document = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert document["average_map"] == 1.0
    assert document["map"] == {"0.3": 1.0, "0.4": 1.0}
    assert document["classes"]["jump"] == {
        "average": 1.0,
        "tiou": {"0.3": 1.0, "0.4": 1.0},
        "truths": 1,
        "predictions": 1,
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"protocol": "coco"}, r"unknown protocol 'coco'; known: \['official', 'opentad'\]"),
        ({"thresholds": ()}, "tiou_thresholds is .*at least one number"),
        ({"thresholds": (0.0,)}, r"tiou_thresholds is \(0.0,\)"),
        ({"thresholds": (1.5,)}, r"in \(0, 1\]"),
        ({"thresholds": (0.5, 0.7, 0.50001)}, r"tiou_thresholds is \(0.5, 0.7, 0.50001\); give each once"),
        ({"classes": ()}, "video 'a' hold label 0, which does not index 0 classes"),
        ({"blocked_videos": ("a",)}, "none of the 1 ground-truth videos .* counts under protocol 'opentad'"),
    ],
)
def test_wrong_arguments_are_named(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        score({"a": detected((0, 10, 0.9, 0))}, record("a", (0, 10, "jump")), **change)


@pytest.mark.parametrize("row", [(float("nan"), 1, 0.5, 0), (0, float("inf"), 0.5, 0), (0, 1, float("nan"), 0)])
def test_predictions_that_are_not_numbers_name_their_video(row: tuple) -> None:
    predictions = {"a": detected((0, 1, 0.5, 0)), "empty": detected(), "b": detected((0, 1, 0.5, 0), row)}
    with pytest.raises(ValueError, match="predictions for video 'b' hold NaN or infinity"):
        score(predictions, record("a", (0, 10, "jump")))


def test_a_video_listed_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="lists video 'a' twice"):
        score({}, record("a", (0, 10, "jump")), record("a", (0, 10, "jump")))
