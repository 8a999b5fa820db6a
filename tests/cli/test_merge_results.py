"""`re2tal merge-results`: what several files find becomes one file; what does not meet is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from re2tal.cli import main
from re2tal.evaluation.results import read_results
from re2tal.evaluation.suppression import SuppressionConfig
from re2tal.runs.merging import MergeOptions, merge_results

Rows = list[tuple[float, float, str, float]]


def write(path: Path, found: dict[str, Rows]) -> Path:
    results = {
        video: [{"segment": [start, end], "label": label, "score": score} for start, end, label, score in rows]
        for video, rows in found.items()
    }
    path.write_text(json.dumps({"results": results}))
    return path


def test_repeats_are_suppressed_and_files_weighted(tmp_path: Path) -> None:
    a = write(tmp_path / "a.json", {"x": [(0, 10, "run", 0.8), (20, 30, "jump", 0.5)], "only a": [(0, 1, "run", 0.1)]})
    b = write(tmp_path / "b.json", {"v_x": [(0, 10, "run", 0.9), (0, 10, "jump", 0.3)]})
    options = MergeOptions(weights=(1.0, 0.5), suppression=SuppressionConfig(method="hard", iou_threshold=0.5))
    done = merge_results([a, b], tmp_path / "out.json", options)
    merged = read_results(tmp_path / "out.json")
    x = merged.of("x")
    rows = [
        (*segment, merged.classes[label], round(score, 6))
        for segment, label, score in zip(x.segments.tolist(), x.labels.tolist(), x.scores.tolist(), strict=True)
    ]
    # b's run, 0.9 * 0.5, lies on a's; its jump lies elsewhere than a's.
    assert rows == [(0.0, 10.0, "run", 0.8), (20.0, 30.0, "jump", 0.5), (0.0, 10.0, "jump", 0.15)]
    assert (done.num_videos, done.num_detections) == (2, 4)
    assert done.notes == (f"{b} lacks 1 of the 2 videos, which have the others' detections alone: 'only a'",)


def test_one_file_is_named_by_a_classifier_and_otherwise_left_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = write(tmp_path / "a.json", {"x": [(0, 10, "action", 0.8), (1, 10, "action", 0.5)]})
    classes = tmp_path / "cuhk.json"
    classes.write_text(json.dumps({"results": {"x": [0.25, 0.75]}, "class": ["jump", "run"]}))
    out = tmp_path / "named.json"
    with pytest.raises(SystemExit, match="0"):
        main(["merge-results", str(a), "--out", str(out), "--video-classes", str(classes), "--top-k", "1"])
    named = read_results(out)
    assert named.classes == ("run",)
    assert named.of("x").scores.tolist() == pytest.approx([0.6, 0.375])
    assert capsys.readouterr().out == f"2 detections in 1 videos; {out}\n"


def test_files_that_do_not_fit_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    a = write(tmp_path / "a.json", {"x": [(0, 10, "run", 0.8), (0, 10, "jump", 0.8)]})
    b = write(tmp_path / "b.json", {"y": [(0, 10, "run", 0.8)]})
    out = tmp_path / "out.json"
    with pytest.raises(ValueError, match=r"a\.json, .*b\.json have no video in common: the first has 'x'"):
        merge_results([a, b], out)
    with pytest.raises(ValueError, match="1 results and 2 weights were given"):
        merge_results([a], out, MergeOptions(weights=(1.0, 2.0)))
    with pytest.raises(ValueError, match=r"weights are \(-1\.0,\); give positive numbers"):
        merge_results([a], out, MergeOptions(weights=(-1.0,)))
    with pytest.raises(ValueError, match=r"video classes, .*b\.json, were given, but .*a\.json has classes of its own"):
        merge_results([a], out, MergeOptions(video_classes=b))
    assert not out.exists()
