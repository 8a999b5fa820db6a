"""`re2tal compare` on files: both are scored by the same rules, and the table says by which."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from parity.vectors import vectors_dir

import re2tal
from re2tal.cli import main
from re2tal.config import RunConfig, save_config
from re2tal.evaluation.ground_truth import read_ground_truth
from re2tal.evaluation.protocols import EvaluationConfig
from re2tal.recipes import find_recipe
from re2tal.runs.comparison import ComparisonOptions, compare

GROUND_TRUTH = vectors_dir() / "eval_plain_gt.json"
PREDICTIONS = vectors_dir() / "eval_plain_pred.json"


def worse(folder: Path) -> Path:
    """The same detections, two seconds late; one video is not there."""
    results = json.loads(PREDICTIONS.read_text())["results"]
    results.pop(next(video for video, rows in results.items() if rows))
    for rows in results.values():
        for row in rows:
            row["segment"] = [value + 2 for value in row["segment"]]
    path = folder / "worse.json"
    path.write_text(json.dumps({"results": results}))
    return path


def test_two_files_are_compared_by_the_same_rules(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    b, out = worse(tmp_path), tmp_path / "figures.json"
    out.symlink_to("elsewhere.json")
    with pytest.raises(SystemExit, match="0"):
        main(
            [
                "compare",
                str(PREDICTIONS),
                str(b),
                "--annotations",
                str(GROUND_TRUTH),
                "--draws",
                "50",
                "--json",
                str(out),
            ]
        )
    figures = json.loads((tmp_path / "elsewhere.json").read_text())["tiou"]
    assert out.is_symlink()
    for side, path in (("a", PREDICTIONS), ("b", b)):
        scored = re2tal.evaluate(path, GROUND_TRUTH)
        assert figures["average"][side] == pytest.approx(scored.average_map)
        assert figures["0.5"][side] == pytest.approx(scored.precision.map_by_tiou["0.5"])
    printed = capsys.readouterr().out
    assert "paired bootstrap, 50 draws of videos" in printed
    assert "protocol opentad; subset validation: " in printed
    assert "; no blocked list; by class" in printed
    assert f"note: {b}: " in printed


def test_in_a_run_folder_its_thresholds_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    demo = find_recipe("demo")
    assert isinstance(demo, RunConfig)
    save_config(tmp_path / "config.json", replace(demo, evaluation=EvaluationConfig(tiou_thresholds=(0.55, 0.95))))
    a = tmp_path / "results.json"
    a.write_bytes(PREDICTIONS.read_bytes())
    records = read_ground_truth(GROUND_TRUTH, subset="validation")
    opened = SimpleNamespace(videos=[SimpleNamespace(record=record) for record in records])
    monkeypatch.setattr("re2tal.runs.comparison.open_any", lambda folder: opened)

    def thresholds(**options: Any) -> list[str]:
        return list(compare(a, worse(tmp_path), options=ComparisonOptions(draws=2, **options)).to_json()["tiou"])

    assert thresholds() == ["0.55", "0.95", "average"]
    assert thresholds(tiou_thresholds=(0.3,)) == ["0.3", "average"]
    assert len(thresholds(dataset="activitynet")) == 11


def test_in_a_run_folder_all_its_rules_count_whatever_the_annotations_are(tmp_path: Path) -> None:
    demo = find_recipe("demo")
    assert isinstance(demo, RunConfig)
    truths = read_ground_truth(GROUND_TRUTH, subset="validation")
    blocked = tmp_path / "blocked.txt"
    blocked.write_text(truths[0].video_id)
    rules = EvaluationConfig(protocol="official", tiou_thresholds=(0.55,), blocked_videos=blocked)
    config = replace(demo, evaluation=rules, localizer=replace(demo.localizer, class_agnostic=True))
    save_config(tmp_path / "config.json", config)
    rows = json.loads(PREDICTIONS.read_text())["results"]
    for found in rows.values():
        for row in found:
            row["label"] = "action"
    a = tmp_path / "results.json"
    a.write_text(json.dumps({"results": rows}))
    text = str(compare(a, a, annotations=GROUND_TRUTH, options=ComparisonOptions(draws=2)))
    assert "protocol official; subset validation: " in text
    assert "1 of the 1 videos on the blocked list left out; class-agnostic" in text
    assert "0.55" in text
    assert "0.7" not in text
    assert f"note: rules that are not given are those of {tmp_path / 'config.json'}" in text
    given = ComparisonOptions(draws=2, tiou_thresholds=(0.3,))
    assert list(compare(a, a, annotations=GROUND_TRUTH, options=given).to_json()["tiou"]) == ["0.3", "average"]


def test_what_is_given_counts_though_the_run_says_otherwise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    demo = find_recipe("demo")
    assert isinstance(demo, RunConfig)
    rules = EvaluationConfig(protocol="official", tiou_thresholds=(0.55,))
    data = replace(demo.data, validation_subset="training")
    save_config(tmp_path / "config.json", replace(demo, evaluation=rules, data=data))
    a = tmp_path / "results.json"
    a.write_bytes(PREDICTIONS.read_bytes())
    # Each is also what it would be outside a run folder.
    given = ["--protocol", "opentad", "--subset", "validation", "--dataset", "thumos14"]
    with pytest.raises(SystemExit, match="0"):
        main(["compare", str(a), str(a), "--annotations", str(GROUND_TRUTH), "--draws", "2", *given])
    printed = capsys.readouterr().out
    assert "protocol opentad; subset validation: " in printed
    assert "0.55" not in printed


def test_what_is_missing_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    b = worse(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        main(["compare", str(b), str(b)])
    assert "lies in no run folder (no config.json beside it)" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["compare", str(b), str(tmp_path / "nothing.json"), "--annotations", str(GROUND_TRUTH)])
    assert "nothing.json is not a file; give a results JSON" in capsys.readouterr().err


def test_a_configuration_of_another_program_beside_a_is_named_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "other"}')
    a = tmp_path / "a.json"
    a.write_text(PREDICTIONS.read_text())
    with pytest.raises(ValueError, match=r"config\.json: unknown key model_type .*move a\.json elsewhere"):
        compare(a, PREDICTIONS, annotations=GROUND_TRUTH)
