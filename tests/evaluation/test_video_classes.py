"""Classes of whole videos: the file is read strictly, and detections take the names and scores it gives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from re2tal.evaluation.video_classes import fuse_video_classes, read_video_classes
from re2tal.structures import Detections

GOOD = {"results": {"a": [0.1, 0.7, 0.2], "b": [1, 0, 0]}, "class": ["jump", "run", "fly"]}


def write(folder: Path, document: object) -> Path:
    path = folder / "cuhk.json"
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return path


def found(*scores: float) -> Detections:
    segments = torch.tensor([[10.0 * n, 10.0 * n + 5] for n in range(len(scores))]).reshape(-1, 2)
    return Detections(segments, torch.tensor(scores), torch.zeros(len(scores), dtype=torch.int64))


def test_each_detection_is_named_once_per_class() -> None:
    ours = fuse_video_classes(found(0.5, 0.4), torch.tensor([0.1, 0.7, 0.2]), top_k=2)
    assert ours.labels.tolist() == [1, 1, 2, 2]
    assert ours.scores.tolist() == pytest.approx([0.35, 0.28, 0.1, 0.08])
    assert ours.segments.tolist() == [[0, 5], [10, 15]] * 2


def test_more_classes_than_there_are_is_an_error() -> None:
    with pytest.raises(ValueError, match="top_k=4 must lie between 1 and the 3 classes"):
        fuse_video_classes(found(0.5), torch.tensor([0.1, 0.7, 0.2]), top_k=4)


def test_every_video_is_named_by_its_own_scores(tmp_path: Path) -> None:
    read = read_video_classes(write(tmp_path, GOOD))
    assert read.classes == ("jump", "run", "fly")
    named = read.name({"a": found(0.5), "b": found(0.25)}, top_k=1)
    assert {video: [read.classes[label] for label in one.labels] for video, one in named.items()} == {
        "a": ["run"],
        "b": ["jump"],
    }
    assert [named[video].scores.item() for video in ("a", "b")] == pytest.approx([0.35, 0.25])


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([], r'needs "results", .* and "class", .* its top level is \[\]'),
        ({"results": {}}, r"its top level is \['results'\]"),
        ({**GOOD, "class": []}, r"class is \[\]; give the list of the classes' names"),
        ({**GOOD, "class": ["jump", 3, "fly"]}, r"class is \['jump', 3, 'fly'\]; give the list"),
        ({**GOOD, "class": ["jump", "run", "run"]}, r"class names 'run' twice; give each of the 3 scores its own name"),
        ({**GOOD, "results": [1]}, r"results is \[1\]; give an object"),
        ({**GOOD, "results": {"a": 0.5}}, r"results\['a'\] is 0\.5; give a list of 3 scores"),
        ({**GOOD, "results": {"a": [0.5, 0.5]}}, r"results\['a'\] holds 2 scores, and \"class\" 3 names"),
        ({**GOOD, "results": {"a": [0.5, -1.5, 0]}}, r"results\['a'\]\[1\] is -1\.5; give a finite score of 0 or more"),
        ({**GOOD, "results": {"a": [0.5, "1", 0]}}, r"results\['a'\]\[1\] is '1'; give a finite score"),
        ({**GOOD, "results": {"a": [True, 0, 0]}}, r"results\['a'\]\[0\] is True; give a finite score"),
        ('{"class": ["x"], "results": {"a": [1e999]}}', r"results\['a'\]\[0\] is inf; give a finite score"),
        ('{"class": ["x"], "results": {"a": [NaN]}}', r"it holds NaN, .* replace it with a finite number"),
    ],
)
def test_a_file_that_says_something_else_is_refused(tmp_path: Path, document: object, message: str) -> None:
    with pytest.raises(ValueError, match=rf"cuhk\.json.*{message}"):
        read_video_classes(write(tmp_path, document))


def test_videos_and_numbers_the_file_does_not_allow_are_named_beforehand(tmp_path: Path) -> None:
    read = read_video_classes(write(tmp_path, GOOD))
    read.check(["a", "b"], top_k=3)
    with pytest.raises(ValueError, match=r"cuhk\.json: results\['c'\] is missing, like 2 of the videos .* add"):
        read.check(["d", "a", "c"], top_k=2)
    for top_k in (0, 4):
        with pytest.raises(ValueError, match=rf"top_k is {top_k}; .*cuhk\.json has 3 classes, so give 1"):
            read.check([], top_k=top_k)
