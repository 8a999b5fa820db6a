"""Ground truth is taken as it stands, and nothing wrong is taken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from re2tal.evaluation.ground_truth import read_ground_truth
from re2tal.structures import Action, VideoRecord


def write(folder: Path, database: Any) -> Path:
    path = folder / "truth.json"
    path.write_text(json.dumps({"database": database}))
    return path


def entry(*annotations: Any, subset: str = "validation", **more: Any) -> dict:
    return {"subset": subset, "duration": 10, "annotations": list(annotations), **more}


def test_empty_and_overlong_segments_are_kept_for_the_protocol_to_judge(tmp_path: Path) -> None:
    segments = [[3, 3], [9, 12.5], ["1.5", "2"]]
    path = write(tmp_path, {"a.b": entry(*({"segment": one, "label": "jump"} for one in segments))})
    actions = tuple(Action(*map(float, segment), "jump") for segment in segments)
    assert read_ground_truth(path, subset="validation") == [VideoRecord("a.b", "validation", 10.0, actions)]


def test_other_subsets_and_ambiguous_segments_are_left_out(tmp_path: Path) -> None:
    one, ambiguous = {"segment": [0, 1], "label": "jump"}, {"segment": [0, 1], "label": "Ambiguous"}
    path = write(tmp_path, {"a": entry(one, subset="training"), "b": entry(ambiguous, one, subset="Validation")})
    (record,) = read_ground_truth(path, subset="validation")
    assert record.video_id == "b"
    assert record.actions == (Action(0.0, 1.0, "jump"),)


@pytest.mark.parametrize("duration", [{}, {"duration": 0}, {"duration": "0.0"}])
def test_a_missing_duration_is_that_of_the_last_end(tmp_path: Path, duration: dict[str, object]) -> None:
    video = {
        "subset": "test",
        **duration,
        "annotations": [{"segment": [0, 7], "label": "a"}, {"segment": [1, 2], "label": "a"}],
    }
    (record,) = read_ground_truth(write(tmp_path, {"a": video}), subset="test")
    assert record.duration_seconds == 7.0


@pytest.mark.parametrize(
    ("database", "message"),
    [
        ([], 'needs an object "database"'),
        ({"a": []}, r"database\['a'\] is \[\]; it needs \"subset\""),
        ({"a": {"annotations": []}}, r"database\['a'\] is .*it needs \"subset\""),
        ({"a": {"subset": "validation"}}, r"database\['a'\]\.annotations is None; it must be a list"),
        ({"a": entry("text")}, r"annotations\[0\] is 'text'; it needs \"segment\""),
        ({"a": entry({"segment": [1, 2]})}, "it needs .*label"),
        ({"a": entry({"segment": [1], "label": "x"})}, 'it needs "segment"'),
        (
            {"a": entry({"segment": [1, "soon"], "label": "x"})},
            r"annotations\[0\]\.segment holds 'soon'; give a finite",
        ),
        ({"a": entry({"segment": [1, "nan"], "label": "x"})}, "holds 'nan'; give a finite number"),
        ({"a": entry({"segment": [1, True], "label": "x"})}, "holds True; give a finite number"),
        ({"a": entry({"segment": [1, 10**400], "label": "x"})}, "holds 1000.*; give a finite number"),
        ({"a": entry(duration="long")}, r"database\['a'\]\.duration holds 'long'"),
        ({"a": entry(subset="training")}, r"no video of subset 'validation'; it has \['training'\]"),
    ],
)
def test_what_is_not_ground_truth_is_named(tmp_path: Path, database: Any, message: str) -> None:
    path = write(tmp_path, database)
    with pytest.raises(ValueError, match=rf"truth\.json.*{message}"):
        read_ground_truth(path, subset="validation")


def test_a_subset_is_found_by_its_other_name(tmp_path):
    path = tmp_path / "truth.json"
    path.write_text('{"database": {"v": {"subset": "Val", "duration": 3, "annotations": []}}}')
    assert [record.video_id for record in read_ground_truth(path, subset="validation")] == ["v"]
    path.write_text('{"v": {"subset": "Val", "duration": 3, "annotations": []}}')
    assert [record.video_id for record in read_ground_truth(path, subset="validation")] == ["v"]
    with pytest.raises(ValueError, match=r"no video of subset 'training'; it has \['Val'\]"):
        read_ground_truth(path, subset="training")
