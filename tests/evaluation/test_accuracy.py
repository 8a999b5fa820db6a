"""Accuracy, counted by hand."""

from __future__ import annotations

import pytest
import torch

from re2tal.evaluation.accuracy import accuracy
from re2tal.evaluation.video_classes import read_video_classes, write_video_classes

CLASSES = ("a", "b", "c", "d", "e", "f", "g")


def scores(**rows: list[float]) -> dict[str, torch.Tensor]:
    return {video_id: torch.tensor(row) for video_id, row in rows.items()}


def test_shares_counted_by_hand():
    truth = {"v1": "a", "v2": "a", "v3": "a", "v4": "b"}
    found = scores(
        v1=[0.9, 0.1, 0, 0, 0, 0, 0],  # right
        v2=[0.2, 0.8, 0, 0, 0, 0, 0],  # second best
        v3=[0.01, 0.3, 0.2, 0.19, 0.15, 0.15, 0],  # sixth
        v4=[0.1, 0.9, 0, 0, 0, 0, 0],  # right
    )
    report = accuracy(found, truth, classes=CLASSES)
    assert (report.top1, report.top5, report.num_videos) == (2 / 4, 3 / 4, 4)
    # Class a has one of three, class b one of one; the other five have no video.
    assert report.mean_class_accuracy == pytest.approx((1 / 3 + 1) / 2)
    assert str(report) == "top-1 50.00 %   top-5 75.00 %   mean class accuracy 66.67 %   of 4 videos"
    assert report.to_json()["top1"] == 0.5


def test_among_equals_the_first_class_is_the_better_one():
    equal = scores(v=[0.2] * 5 + [0.0] * 2)
    assert accuracy(equal, {"v": "a"}, classes=CLASSES).top1 == 1
    assert accuracy(equal, {"v": "b"}, classes=CLASSES).top1 == 0
    assert accuracy(equal, {"v": "e"}, classes=CLASSES).top5 == 1
    assert accuracy(equal, {"v": "f"}, classes=CLASSES).top5 == 0


def test_a_video_without_scores_is_wrong_however_few_classes_there_are():
    report = accuracy(scores(v=[1.0, 0.0]), {"v": "a", "w": "b"}, classes=("a", "b"))
    assert (report.top1, report.top5, report.mean_class_accuracy) == (0.5, 0.5, 0.5)
    assert str(report).endswith("of 2 videos\nnote: 1 videos have no scores, and count as wrong: 'w'")
    assert report.to_json()["videos_without_scores"] == ("w",)


def test_ids_match_without_suffix_and_no_scores_at_all_are_an_error():
    found = scores(**{"v.mp4": [1.0, 0.0]})
    assert accuracy(found, {"v": "a"}, classes=("a", "b")).top1 == 1
    with pytest.raises(ValueError, match="none of the 2 videos has scores"):
        accuracy({}, {"v": "a", "w": "b"}, classes=("a", "b"))


@pytest.mark.parametrize(
    ("found", "truth", "message"),
    [
        (scores(v=[1.0, 0.0]), {}, "there is no video with a class to compare with"),
        (scores(w=[1.0, 0.0]), {"v": "a"}, "scores of 'w', like 1 in all, belong to no video"),
        (scores(v=[1.0, 0.0]), {"v": "x"}, "video 'v' shows 'x', which is not among the 2 classes"),
        (scores(v=[1.0, float("nan")]), {"v": "a"}, "the scores of video 'v' are not all finite"),
    ],
)
def test_what_cannot_be_compared_is_an_error(found, truth, message):
    with pytest.raises(ValueError, match=message):
        accuracy(found, truth, classes=("a", "b"))


def test_scores_are_read_back_as_they_were_written(tmp_path):
    found = scores(v=[0.25, 0.75], w=[1.0, 0.0])
    write_video_classes(tmp_path / "results.json", found, ("a", "b"))
    read = read_video_classes(tmp_path / "results.json")
    assert read.classes == ("a", "b")
    assert {video_id: row.tolist() for video_id, row in read.scores.items()} == {"v": [0.25, 0.75], "w": [1.0, 0.0]}
