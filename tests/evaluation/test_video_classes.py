"""Classes of whole videos: the file is read strictly, and detections take the names and scores it gives."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from re2tal.evaluation.selection import Selection
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


def test_named_detections_come_best_first_whatever_their_class(tmp_path: Path) -> None:
    """They came class by class, so that the first ones were all of the best class, the weakest too."""
    named = read_video_classes(write(tmp_path, GOOD)).name({"a": found(0.9, 0.1)}, top_k=2)["a"]
    assert named.scores.tolist() == pytest.approx([0.63, 0.18, 0.07, 0.02])
    best = Selection(top=2).after(named)
    assert best.labels.tolist() == [1, 2]
    assert best.segments.tolist() == [[0, 5]] * 2


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


def test_videos_and_numbers_the_file_does_not_allow_are_named_beforehand(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    read = read_video_classes(write(tmp_path, GOOD))
    read.check(["a", "v_b"], top_k=3)
    assert not caplog.records
    read.check(["d", "a", "c"], top_k=2)
    assert "cuhk.json has no scores of 2 of the 3 videos, " in caplog.text
    assert caplog.text.rstrip().endswith("count as missed: 'c', 'd'")
    named = read.name({"a": found(0.5), "d": found(0.5)}, top_k=2)
    assert [len(one) for one in named.values()] == [2, 0]
    with pytest.raises(ValueError, match=r"cuhk\.json: results\['c'\] is missing, like all 2 videos .* add"):
        read.check(["d", "c"], top_k=2)
    for top_k in (0, 4):
        with pytest.raises(ValueError, match=rf"top_k is {top_k}; .*cuhk\.json has 3 classes, so give 1"):
            read.check([], top_k=top_k)


def test_scores_fuse_by_their_product_or_its_root(tmp_path: Path) -> None:
    path = write(tmp_path, {"results": {"a": [0.25, 0.0]}, "classes": ["jump", "run"]})
    for fusion, expected in (("product", 0.25 * 0.16), ("square-root", 0.5 * 0.4)):
        named = read_video_classes(path, fusion=fusion).name({"a": found(0.16)}, top_k=1)
        assert named["a"].scores.item() == pytest.approx(expected)


def test_logits_in_tcanets_layout_become_probabilities(tmp_path: Path) -> None:
    read = read_video_classes(write(tmp_path, {"results": {"a": [[0.0, -1.0]]}, "class": ["jump", "run"]}))
    assert read.scores["a"].tolist() == pytest.approx([1 / (1 + math.exp(-1)), 1 / (1 + math.e)])


def test_untrimmednets_table_is_read_by_the_numbers_of_videos_and_classes(tmp_path: Path) -> None:
    table = np.zeros((5, 101), dtype=np.float32)
    table[3, 6], table[3, 96], table[3, 0] = 0.5, 0.25, 0.9  # BaseballPitch, VolleyballSpiking, ApplyEyeMakeup
    np.save(tmp_path / "unet.npy", table)
    read = read_video_classes(tmp_path / "unet.npy")
    named = read.name({"video_test_0000004": found(1.0)}, top_k=2)["video_test_0000004"]
    assert [read.classes[label] for label in named.labels] == ["BaseballPitch", "VolleyballSpiking"]
    assert named.scores.tolist() == [0.5, 0.25]
    assert len(read.scores) == 5


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (np.zeros((5, 20)), r"holds float64 \(5, 20\); UntrimmedNet's scores"),
        (np.full((5, 101), -1.0), r"row 0 holds -1\.0; give finite scores of 0 or more"),
        (np.array([{}], dtype=object), r"is not a table of numbers: "),
    ],
)
def test_another_table_is_refused(tmp_path: Path, table: np.ndarray, message: str) -> None:
    np.save(tmp_path / "unet.npy", table, allow_pickle=True)
    with pytest.raises(ValueError, match=rf"unet\.npy:? {message}"):
        read_video_classes(tmp_path / "unet.npy")


def test_a_pickle_is_refused(tmp_path: Path) -> None:
    (tmp_path / "scores.pkl").write_bytes(b"")
    with pytest.raises(ValueError, match="is a pickle, which can run code"):
        read_video_classes(tmp_path / "scores.pkl")
