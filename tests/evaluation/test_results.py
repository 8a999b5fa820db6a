"""Results JSON: what is written can be read, and nothing wrong is read quietly."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from re2tal.evaluation.results import read_results, write_results
from re2tal.structures import Detections

CLASSES = ("jump", 'run "fast" </script>', "日本語")


def detections(*rows: tuple[float, float, float, int], dtype: torch.dtype = torch.float32) -> Detections:
    table = torch.tensor(rows, dtype=torch.float64).reshape(-1, 4)
    return Detections(table[:, :2].to(dtype), table[:, 2].to(dtype), table[:, 3].long())


def document(prediction: object) -> dict:
    return {"version": "VERSION 1.3", "results": {"video": [prediction]}, "external_data": {}}


GOOD = {"segment": [0.5, 2], "label": "jump", "score": 0.25}


def test_what_is_written_is_read_with_all_its_digits(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "results.json"
    predictions = {
        "b": detections((0.1, 2 / 3, 0.3, 2), (1, 2, 1e-7, 0)),
        "a": detections((5, 6, 1, 1), dtype=torch.bfloat16),
        "nothing": detections(),
    }
    write_results(path, predictions, CLASSES)
    results = read_results(path)
    assert list(results.predictions) == ["b", "a", "nothing"]
    assert results.classes == (CLASSES[2], CLASSES[0], CLASSES[1])
    for video_id, written in predictions.items():
        read = results.predictions[video_id]
        assert read.segments.dtype == read.scores.dtype == torch.float64
        assert torch.equal(read.segments, written.segments.double())
        assert torch.equal(read.scores, written.scores.double())
        names = [CLASSES[label] for label in written.labels]
        assert [results.classes[label] for label in read.labels] == names


def test_the_layout_is_that_of_activitynet(tmp_path: Path) -> None:
    write_results(tmp_path / "r.json", {"v": detections((1, 2.5, 0.75, 0))}, CLASSES)
    assert json.loads((tmp_path / "r.json").read_text()) == {
        "version": "VERSION 1.3",
        "results": {"v": [{"segment": [1.0, 2.5], "label": "jump", "score": 0.75}]},
        "external_data": {},
    }


def test_what_a_limit_cut_is_kept_where_it_is_known(tmp_path: Path) -> None:
    path, found = tmp_path / "r.json", detections((1, 2.5, 0.75, 0))
    write_results(path, {"v": replace(found, num_cut=12), "w": replace(found, num_cut=0)}, CLASSES)
    assert [one.num_cut for one in read_results(path).predictions.values()] == [12, 0]
    write_results(path, {"v": replace(found, num_cut=12), "w": found}, CLASSES)
    assert read_results(path).of("v").num_cut is None
    path.write_text('{"results": {"v": []}, "num_cut": {"v": -1}}')
    with pytest.raises(ValueError, match=r"r\.json: num_cut is \{'v': -1\}; give an object that maps video ids"):
        read_results(path)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.json"
    path.write_text("old")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_results(path, {"v": detections((1, 2, 0.5, 0))}, CLASSES)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ((float("nan"), 1, 0.5, 0), "segments predicted for video 'v' hold NaN"),
        ((0, 1, float("inf"), 0), "scores predicted for video 'v' hold NaN or infinity"),
        ((0, 1, 0.5, 3), "labels 3 to 3 predicted for video 'v' do not index 3 classes"),
        ((0, 1, 0.5, -1), "do not index"),
    ],
)
def test_unusable_detections_are_not_written(tmp_path: Path, rows: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_results(tmp_path / "r.json", {"v": detections(rows)}, CLASSES)
    assert not list(tmp_path.iterdir())


def test_files_of_other_programs_are_read(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_bytes(json.dumps({"results": {"v": [{**GOOD, "label_id": 3}], "w": []}}).encode("utf-8-sig"))
    results = read_results(path)
    assert results.predictions["v"].segments.tolist() == [[0.5, 2.0]]
    assert len(results.predictions["w"]) == 0
    assert results.classes == ("jump",)


@pytest.mark.parametrize(
    ("prediction", "message"),
    [
        ({"segment": [0, 1], "score": 0.5}, r"results\['video'\]\[0\] is .*needs the keys"),
        ([0, 1, 0.5], r"\[0\] is \[0, 1, 0.5\]; it needs the keys"),
        ("text", "it needs the keys"),
        (None, "it needs the keys"),
        ({**GOOD, "segment": [0]}, r"segment is \[0\]; give \[start, end\] in finite seconds"),
        ({**GOOD, "segment": ["0", "1"]}, r"segment is \['0', '1'\]"),
        ({**GOOD, "segment": {"0": 1, "1": 2}}, "segment is {"),
        ({**GOOD, "segment": [True, 1]}, r"segment is \[True, 1\]"),
        ({**GOOD, "label": 7}, "label is 7; give the name of a class"),
        ({**GOOD, "score": "0.5"}, "score is '0.5'; give a finite number"),
        ({**GOOD, "score": None}, "score is None"),
        ({**GOOD, "score": True}, "score is True"),
        ({**GOOD, "score": 10**400}, "score is 1000.*; give a finite number"),
    ],
)
def test_a_wrong_prediction_is_named_by_file_video_and_position(
    tmp_path: Path, prediction: object, message: str
) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(document(prediction)))
    with pytest.raises(ValueError, match=f"mine.json.*{message}"):
        read_results(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not usable JSON"),
        ("{'results': {}}", "not usable JSON"),
        ('{"results": {}', "not usable JSON"),
        ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
        ('{"results": ' + '{"a":' * 100_000 + "1" + "}" * 100_001, "nested too deeply"),
        (json.dumps(document({**GOOD, "score": float("nan")})), "it holds NaN, which is not a number in JSON"),
        (json.dumps(document({**GOOD, "score": float("-inf")})), "it holds -Infinity"),
        (json.dumps(document(GOOD)).replace("0.25", "1e999"), "score is inf; give a finite number"),
        (json.dumps(document(GOOD)).replace("0.25", "1" * 5000), "not usable JSON"),
        ('{"results": {"v": [], "w": [], "v": []}}', "the key 'v' appears twice in one object"),
        ("[]", r'needs an object "results".*top level is \[\]'),
        ('{"database": {}}', r"needs an object \"results\".*top level is \['database'\]"),
        ('{"results": []}', 'needs an object "results"'),
        ('{"results": {"v": {}}}', r"results\['v'\] is {}; it must be a list"),
    ],
)
def test_a_file_that_is_not_results_json_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"(?s)mine.json.*{message}"):
        read_results(path)


def test_bytes_that_are_not_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_bytes(b'{"results": {"\xff\xfe": []}}')
    with pytest.raises(ValueError, match=r"mine\.json is not usable JSON"):
        read_results(tmp_path / "mine.json")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.json is not a file"):
        read_results(tmp_path / "absent.json")
