"""What `re2tal report` scores; tests/cli/test_detect.py holds the page of a run whose videos were detected."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from re2tal.cli.report import report
from re2tal.config import RunConfig, save_config
from re2tal.structures import VideoRecord

LABELS = ("jump", "run", "jump")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The run folder of a class-agnostic detector, and truths of three videos beside it."""
    settings = RunConfig()
    save_config(tmp_path / "config.json", replace(settings, localizer=replace(settings.localizer, class_agnostic=True)))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "kind": "train", "loss": 1.0}\n')
    database = {
        f"v{n}": {"subset": "validation", "duration": 9, "annotations": [{"segment": [n, n + 3], "label": label}]}
        for n, label in enumerate(LABELS)
    }
    (tmp_path / "truth.json").write_text(json.dumps({"database": database}))
    return tmp_path


def write_results(run: Path, labels: tuple[str, ...]) -> None:
    results = {f"v{n}": [{"segment": [n, n + 3], "label": label, "score": 0.5}] for n, label in enumerate(labels)}
    (run / "results.json").write_text(json.dumps({"results": results}))


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (("action",) * 3, "average mAP 100.00 %"),
        (LABELS, "average mAP 100.00 %"),  # named by a classifier of whole videos
        (("run", "run", "jump"), "average mAP 50.00 %"),  # jump: 1 of 2 found; run: right at the second of two
    ],
)
def test_results_of_a_class_agnostic_detector_are_scored_by_the_names_they_have(
    run: Path, labels: tuple[str, ...], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_results(run, labels)
    report(run=run, annotations=run / "truth.json", max_videos=0)
    assert capsys.readouterr().out.startswith(expected)


def test_so_many_timelines_are_drawn_and_old_ones_go(run: Path) -> None:
    write_results(run, LABELS)
    for max_videos, expected in ((2, ["0000_v0.png", "0001_v1.png"]), (1, ["0000_v0.png"])):
        report(run=run, annotations=run / "truth.json", max_videos=max_videos)
        assert sorted(path.name for path in (run / "report" / "timelines").iterdir()) == expected
    assert "3, of which 1 are drawn below" in (run / "report" / "index.html").read_text()
    with pytest.raises(ValueError, match="max_videos is -1; give 0 or more"):
        report(run=run, annotations=run / "truth.json", max_videos=-1)


def test_a_stand_in_for_a_length_is_not_drawn_as_one(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_results(run, LABELS)
    truth = json.loads((run / "truth.json").read_text())
    del truth["database"]["v1"]["duration"]
    (run / "truth.json").write_text(json.dumps(truth))
    known = {}

    def draw(record: VideoRecord, *_: object, is_length_known: bool, **__: object) -> Figure:
        known[record.video_id] = is_length_known
        return Figure()

    monkeypatch.setattr("re2tal.runs.page.draw_timeline", draw)
    report(run=run, annotations=run / "truth.json")
    assert known == {"v0": True, "v1": False, "v2": True}


def pixels(path: Path) -> set[tuple[int, ...]]:
    return {tuple(pixel) for row in (255 * imread(path)).round().astype(int)[:, :, :3].tolist() for pixel in row}


def test_predictions_on_other_videos_are_drawn_and_not_scored(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = [{"segment": [2, 4], "label": "run", "score": 1.0}]
    (run / "new.json").write_text(json.dumps({"results": {"new": found, "empty": []}}))
    report(run=run, annotations=run / "truth.json", predictions=run / "new.json")
    assert capsys.readouterr().out.startswith("not scored: no predicted video is among those with known actions")
    page = (run / "report" / "index.html").read_text()
    assert "no predicted video is among the 3 with known actions" in page
    assert "<table>" not in page
    assert "0.00" not in page
    drawn = sorted((run / "report" / "timelines").iterdir())
    assert [path.name for path in drawn] == ["0000_new.png", "0001_empty.png"]
    right, wrong, unknown = (0, 114, 178), (213, 94, 0), (122, 79, 181)
    assert unknown in pixels(drawn[0])
    assert not {right, wrong} & pixels(drawn[0])


def test_predicted_videos_come_first_under_the_names_of_the_truth(run: Path) -> None:
    found = [{"segment": [2, 5], "label": "action", "score": 1.0}]
    (run / "results.json").write_text(json.dumps({"results": {"v2.mp4": found, "other": found}}))
    report(run=run, annotations=run / "truth.json")
    names = [path.name for path in sorted((run / "report" / "timelines").iterdir())]
    assert names == ["0000_v2.png", "0001_v0.png", "0002_v1.png", "0003_other.png"]
    assert (0, 114, 178) in pixels(run / "report" / "timelines" / "0000_v2.png")
    assert "by tIoU; protocol opentad" in (run / "report" / "index.html").read_text()
