"""EPIC-Kitchens' own numbers for verbs, nouns and actions, from its table and a submission, through `evaluate`."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from parity.vectors import read_json, vectors_dir

from re2tal.cli.evaluate import evaluate
from re2tal.runs.epic_kitchens import evaluate_submission
from re2tal.runs.evaluation import ScoringOptions

CASES = sorted(path.name for path in vectors_dir().glob("protocol_epic_*.json"))
TABLE = "EPIC_100_validation.csv"


@pytest.fixture(params=CASES or [pytest.param("", marks=pytest.mark.skip("no such vectors in this folder"))])
def case(request: pytest.FixtureRequest, tmp_path: Path) -> dict:
    """A reference case, whose table and submission are written as the files that people have."""
    document = read_json(request.param)
    rows = document["ground_truth"]
    with (tmp_path / TABLE).open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    (tmp_path / "submission.json").write_text(json.dumps(document["submission"]))
    return document


def test_the_numbers_are_those_of_the_challenge(case: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tious = tuple(case["tiou_thresholds"])
    out = tmp_path / "figures.json"
    evaluate(
        predictions=tmp_path / "submission.json",
        annotations=tmp_path / TABLE,
        options=ScoringOptions(tiou_thresholds=tious),
        json=out,
    )
    figures = json.loads(out.read_text())
    for task, expected in case["numbers"].items():
        found = figures[task]
        assert list(found["map"].values()) == pytest.approx(expected["mAP"], abs=1e-9)
        assert found["average_map"] == pytest.approx(expected["average_mAP"], abs=1e-9)
        noun_count = case["noun_count"]
        numbers = {
            (int(name.split(",")[0]) * noun_count + int(name.split(",")[1])) if "," in name else int(name): one
            for name, one in found["classes"].items()
        }
        assert sorted(numbers) == sorted(expected["classes"])
        for row, tiou in zip(expected["ap"], found["map"], strict=True):
            ours = [numbers[number]["tiou"][tiou] for number in expected["classes"]]
            assert ours == pytest.approx(row, abs=1e-9)
        assert sum(one["predictions"] for one in numbers.values()) == expected["predictions_used"]
    printed = capsys.readouterr().out
    assert printed.startswith("mAP in %, by tIoU; protocol epic-kitchens\nsubset validation: ")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("verb", "3", r"\.verb is '3'; give the number of a verb"),
        ("action", "3-4", r"\.action is '3-4'; give \"VERB,NOUN\""),
        ("segment", [1], r"\.segment is \[1\]; give \[start, end\]"),
        ("score", None, r"\.score is None; give a finite number"),
    ],
)
def test_a_submission_that_says_something_else_is_refused(
    tmp_path: Path, key: str, value: object, message: str
) -> None:
    row = {"verb": 3, "noun": 4, "action": "3,4", "segment": [0, 1], "score": 0.5} | {key: value}
    (tmp_path / "submission.json").write_text(json.dumps({"results": {"P01_11": [row]}}))
    (tmp_path / TABLE).write_text(
        "video_id,start_timestamp,stop_timestamp,verb_class,noun_class\nP01_11,00:00:01.00,00:00:02.00,3,4\n"
    )
    with pytest.raises(ValueError, match=rf"submission\.json: results\['P01_11'\]\[0\]{message}"):
        evaluate_submission(tmp_path / "submission.json", tmp_path / TABLE, ScoringOptions())
    with pytest.raises(ValueError, match="own rules, with --tiou-thresholds and --blocked-videos at most"):
        evaluate_submission(tmp_path / "submission.json", tmp_path / TABLE, ScoringOptions(errors=True))
    (tmp_path / TABLE).write_text("video_id,start_timestamp,stop_timestamp,verb_class,noun_class\na,soon,1,3,4\n")
    with pytest.raises(ValueError, match=r"line 2: start_timestamp is 'soon'; give HH:MM:SS\.ss"):
        evaluate_submission(tmp_path / "submission.json", tmp_path / TABLE, ScoringOptions())
