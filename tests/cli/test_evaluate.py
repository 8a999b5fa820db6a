"""`re2tal evaluate` on files: the numbers of the published evaluators, from the command line's own function."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import pytest
from parity.vectors import load, vectors_dir

from re2tal.cli.evaluate import evaluate
from re2tal.evaluation.protocols import TIOU_THRESHOLDS, Dataset
from re2tal.runs.evaluation import ScoringOptions

DATASETS = sorted(path.stem[len("eval_") : -len("_gt")] for path in vectors_dir().glob("eval_*_gt.json"))


def files(dataset: str) -> dict[str, Path]:
    return {
        "predictions": vectors_dir() / f"eval_{dataset}_pred.json",
        "annotations": vectors_dir() / f"eval_{dataset}_gt.json",
    }


@pytest.mark.parametrize("protocol", ["official", "opentad"])
@pytest.mark.parametrize("dataset", DATASETS)
def test_the_figures_are_those_of_the_published_evaluators(
    dataset: str, protocol: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arrays = load("eval").arrays
    out = tmp_path / "figures.json"
    tious = tuple(arrays[f"{dataset}_anet_tiou"].tolist())
    evaluate(**files(dataset), options=ScoringOptions(protocol=protocol, tiou_thresholds=tious), json=out)
    figures = json.loads(out.read_text())
    expected = f"{dataset}_anet_file_order_map"
    expected = expected if expected in arrays else f"{dataset}_anet_{protocol}_map"
    assert list(figures["map"].values()) == pytest.approx(arrays[expected].tolist(), abs=1e-9)
    assert figures["average_map"] == pytest.approx(float(arrays[expected].mean()), abs=1e-9)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].endswith(f"protocol {protocol}")
    assert printed[-1].split()[-1] == f"{100 * figures['average_map']:.2f}"


def test_recall_is_printed_on_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "figures.json"
    evaluate(**files(DATASETS[0]), options=ScoringOptions(dataset="activitynet", proposals=10, top_kx=(1, 5)), json=out)
    at_kx = json.loads(out.read_text())["recall_at_kx"]
    assert 0 < at_kx["1"]["0.5"] <= at_kx["5"]["0.5"] < 1
    figures = json.loads(out.read_text())["recall"]
    assert len(figures["average_recall"]) == 10
    printed = capsys.readouterr().out.splitlines()
    assert "recall in %; protocol opentad; subset validation: " in printed[-4]
    curve = [100 * figures["average_recall"][n - 1] for n in (1, 5, 10)]
    assert printed[-1] == "AR@1 {:.2f}   AR@5 {:.2f}   AR@10 {:.2f}   AUC {:.2f}".format(*curve, 100 * figures["auc"])


def test_intervals_over_videos_and_seeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, both = tmp_path / "figures.json", files(DATASETS[0])
    evaluate(**both, options=ScoringOptions(bootstrap=50, seeds=(both["predictions"],)), json=out)
    bootstrap = json.loads(out.read_text())["bootstrap"]
    low, high = bootstrap["tiou"]["average"]["interval"]
    assert 0 < low < bootstrap["tiou"]["average"]["map"] < high < 1
    assert "from 50 draws of videos and of the 2 runs; protocol opentad; subset" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--bootstrap-seed is -1; give 0 or more"):
        evaluate(**both, options=ScoringOptions(bootstrap=50, bootstrap_seed=-1))
    with pytest.raises(ValueError, match="were given without bootstrap"):
        evaluate(**both, options=ScoringOptions(seeds=(both["predictions"],)))


def test_errors_are_diagnosed_on_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "figures.json"
    evaluate(**files(DATASETS[0]), options=ScoringOptions(errors=True), json=out)
    errors = json.loads(out.read_text())["errors"]
    printed = capsys.readouterr().out
    assert f"normalised mAP {100 * errors['average_map_normalized']:.2f}" in printed
    assert "double detection" in printed
    assert set(errors["gain"]) < set(errors["counts"][0])


def test_nothing_is_said_of_coverage_where_a_duration_is_not_known(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = files(DATASETS[0])
    document = json.loads(both["annotations"].read_text())
    videos = [name for name, entry in document["database"].items() if entry["annotations"]]
    del document["database"][videos[0]]["duration"]
    (tmp_path / "truth.json").write_text(json.dumps(document))
    reports = []
    for truth in (both["annotations"], tmp_path / "truth.json"):
        evaluate(
            predictions=both["predictions"],
            annotations=truth,
            options=ScoringOptions(errors=True),
            json=tmp_path / "figures.json",
        )
        reports.append(json.loads((tmp_path / "figures.json").read_text())["errors"])
    known, unknown = reports
    assert "coverage" in known["missed"]
    assert known["without_duration"] == []
    assert {"length", "num-instances", "length|num-instances"} == unknown["missed"].keys()
    assert "coverage" not in unknown["sensitivity"]
    assert unknown["without_duration"] == [videos[0]]
    assert unknown["missed"]["length"] == known["missed"]["length"]
    line = f"coverage is left out: the annotations do not give the duration of 1 videos: {videos[0]!r}"
    assert line in capsys.readouterr().out


def test_class_agnostic_scores_segments_alone(tmp_path: Path) -> None:
    truth = {"subset": "validation", "duration": 9, "annotations": [{"segment": [0, 4], "label": "jump"}]}
    (tmp_path / "truth.json").write_text(json.dumps({"database": {"a": truth}}))
    (tmp_path / "found.json").write_text(
        json.dumps({"results": {"a": [{"segment": [0, 4], "label": "x", "score": 1}]}})
    )
    paths = {"predictions": tmp_path / "found.json", "annotations": tmp_path / "truth.json"}
    evaluate(**paths, options=ScoringOptions(class_agnostic=True), json=tmp_path / "figures.json")
    assert json.loads((tmp_path / "figures.json").read_text())["average_map"] == 1.0
    with pytest.raises(ValueError, match=r"no predicted label has a true action .*'x', and there 'jump'"):
        evaluate(**paths)


def test_blocked_videos_are_left_out(tmp_path: Path) -> None:
    video_id = next(iter(json.loads(files(DATASETS[0])["annotations"].read_text())["database"]))
    (tmp_path / "blocked.json").write_text(json.dumps([video_id]))
    sums = []
    for blocked in (None, tmp_path / "blocked.json"):
        evaluate(**files(DATASETS[0]), options=ScoringOptions(blocked_videos=blocked), json=tmp_path / "figures.json")
        classes = json.loads((tmp_path / "figures.json").read_text())["classes"]
        sums.append(sum(one["predictions"] for one in classes.values()))
    assert sums[1] < sums[0]


def test_a_blocked_list_of_another_form_is_refused(tmp_path: Path) -> None:
    (tmp_path / "blocked.json").write_text('{"a": 1}')
    with pytest.raises(ValueError, match=r"blocked\.json is not a JSON list of video ids; give one"):
        evaluate(**files(DATASETS[0]), options=ScoringOptions(blocked_videos=tmp_path / "blocked.json"))


def test_every_data_set_has_thresholds() -> None:
    assert set(get_args(Dataset)) == set(TIOU_THRESHOLDS)
