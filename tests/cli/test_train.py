"""The train command from video files to a score, on two ranks, through the real data path."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from distributed.commands import re2tal
from distributed.ranks import launch_ranks
from safetensors.torch import save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from re2tal.backbones import BackboneConfig, build_backbone
from re2tal.cli import main
from re2tal.config import load_config, save_config
from re2tal.data.building.annotations import read_annotations
from re2tal.data.building.demo import DemoConfig, write_demo
from re2tal.data.streaming.windows import ResizeWhole
from re2tal.evaluation.results import read_results
from re2tal.recipes import find_recipe
from re2tal.training.export import read_model

ROOT = Path(__file__).parents[2]
SMALL = [
    "--data.clips.windowing.num-frames",
    "32",
    "--data.clips.size",
    "32",
    "--data.clips.workers",
    "1",
    "--num-steps",
    "16",
    "--localizer.channels",
    "16",
    "--localizer.max-num-steps",
    "16",
    "--backbone.drop-path",
    "0.2",
    "--engine.batch-size",
    "1",
    "--training.epochs",
    "2",
    "--training.checkpoint-every-steps",
    "3",
    "--training.log-every-steps",
    "1",
    "--schedule.warmup-epochs",
    "0.5",
    "--annealing.epochs",
    "1.5",
]


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """Six training and two validation videos of the demo."""
    folder = tmp_path_factory.mktemp("data")
    write_demo(folder, DemoConfig(num_training=6, num_validation=2), workers=1)
    arguments = ["--dataset", "demo", "--videos", folder / "videos", "--annotations", folder / "annotations.json"]
    with pytest.raises(SystemExit):
        main(["shards", "build", *map(str, arguments), "--out", str(folder / "shards"), "--workers", "1"])
    return folder / "shards"


def test_from_videos_to_a_score_and_the_same_weights_after_a_restart(shards, tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, str(ROOT / "launch" / "train.py"), "--ds", str(ROOT / "ds_configs" / "zero2.json")]
    command += ["--data.shards", str(shards), "--out", str(out), *SMALL]
    launch_ranks(command, world_size=2, timeout_seconds=280)

    summary = json.loads((out / "summary.json").read_text())
    assert {"average_map", "map", "train_seconds", "total_seconds", "videos", "protocol"} <= summary.keys()
    assert (summary["videos"], summary["steps"], summary["ranks"]) == (2, 6, 2)
    truth = read_annotations(shards.parent / "annotations.json")
    assert set(read_results(out / "results.json").predictions) == {
        record.video_id for record in truth.subset("validation")
    }
    whole = read_model(out / "model.safetensors")
    assert whole.classes == truth.classes
    assert load_config(out / "config.json").num_steps == 16
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
    assert [row["beta"] for row in rows if row["kind"] == "train"] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert whole.wiring == {"unit": "branch", "merge": "mean", "segment": None, "beta": 1, "ends": []}

    # As if it had been killed after step 3. Its own config.json starts it again.
    shutil.rmtree(out / "checkpoints" / "step-00000006")
    again = ["train", *command[2:4], "--config", str(out / "config.json"), "--out", str(out)]
    with pytest.raises(RuntimeError, match="holds the checkpoints of an earlier run; continue it"):
        re2tal(*again, cwd=tmp_path, world_size=2)
    re2tal(*again, "--resume", cwd=tmp_path, world_size=2)
    resumed = read_model(out / "model.safetensors")
    assert all(value.equal(resumed.weights[name]) for name, value in whole.weights.items())
    results = read_results(out / "results.json").predictions
    assert json.loads((out / "summary.json").read_text())["average_map"] == summary["average_map"]
    assert all(len(detections) > 0 for detections in results.values())

    with pytest.raises(RuntimeError, match=r"training.seed is 7, the checkpoint has 0"):
        re2tal(*again, "--training.seed", "7", "--resume", cwd=tmp_path)
    assert load_config(out / "config.json").training.seed == 0, "what was refused replaced the run's own configuration"
    with pytest.raises(RuntimeError, match=r"backbone.norm_eval freezes the norms of a pretrained backbone"):
        re2tal(*again, "--overwrite", "--backbone.norm-eval", cwd=tmp_path)
    assert (out / "model.safetensors").is_file(), "what was refused removed the earlier run"


@pytest.mark.slow
def test_a_share_of_the_clips_trains_on_two_ranks_and_the_summary_says_so(shards, tmp_path):
    """Two of eight clips a step, under ZeRO-3; an epoch later, the others come from the memory in the run folder."""
    out, run = tmp_path / "run", find_recipe("demo")
    small = replace(
        run,
        num_steps=16,
        data=replace(
            run.data,
            shards=shards,
            clips=replace(run.data.clips, windowing=ResizeWhole(num_frames=32), size=32, workers=1),
        ),
        backbone=BackboneConfig(name="videomae_nano", trained_clips=0.25, clips_at_once=1),
        localizer=replace(run.localizer, channels=16, max_num_steps=16),
        engine=replace(run.engine, batch_size=1),
        schedule=replace(run.schedule, warmup_epochs=0.5),
        training=replace(run.training, epochs=2, log_every_steps=1, checkpoint_every_steps=100),
    )
    save_config(tmp_path / "config.json", small)
    command = [sys.executable, str(ROOT / "launch" / "train.py"), "--ds", str(ROOT / "ds_configs" / "zero3.json")]
    command += ["--config", str(tmp_path / "config.json"), "--out", str(out)]
    said = launch_ranks(command, world_size=2, timeout_seconds=280)
    assert "approximation: a step trains 0.25 of the clips of a video" in said[0]
    assert json.loads((out / "summary.json").read_text())["approximation"].startswith("approximation: a step trains")
    remembered = [np.load(path) for path in (out / "clip_features").iterdir()]
    assert len(remembered) == 6
    assert all(one.shape == (8, 2, 48) and np.isfinite(one).all() for one in remembered)
    with pytest.raises(RuntimeError, match="which draws other clips in every epoch"):
        launch_ranks([*command[:4], "--recipe", "demo", "--backbone.trained-clips", "0.5"], world_size=1)


def test_a_run_that_names_relative_paths_goes_on_from_another_folder(shards, tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    (here / "shards").symlink_to(shards)
    weights = build_backbone(BackboneConfig(name="swin3d_nano")).state_dict()
    save_file(weights, here / "swin.safetensors")
    paths = ["--data.shards", "shards", "--backbone.weights", "swin.safetensors", "--out", "run"]
    printed = re2tal("train", *SMALL, *paths, "--training.evaluate-every-epochs", 1, cwd=here).output
    out = here / "run"
    assert f"model: {Path('run') / 'model.safetensors'}; average mAP" in printed
    assert "(protocol opentad, subset validation)" in printed
    next_commands = [line.split()[:2] for line in printed.splitlines()[-3:]]
    assert next_commands == [["re2tal", "view"], ["re2tal", "detect"], ["re2tal", "evaluate"]]
    seen = EventAccumulator(str(out / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    assert [one.step for one in seen.Scalars("train/loss")] == list(range(1, 13))
    assert [one.step for one in seen.Images("precision_recall")] == [6, 12]
    assert {"evaluation/map/0.5", "train/loader_wait", "train/skipped"} <= set(seen.Tags()["scalars"])
    assert {"timeline/1", "timeline/2"} <= set(seen.Tags()["images"])
    whole = read_model(out / "model.safetensors")

    shutil.rmtree(out / "checkpoints" / "step-00000012")
    again = ["train", "--config", "../here/run/config.json", "--out", "../here/run", "--resume"]
    re2tal(*again, cwd=there)
    resumed = read_model(out / "model.safetensors")
    assert all(value.equal(resumed.weights[name]) for name, value in whole.weights.items())
    re2tal("detect", "--run", "../here/run", "--out", "found.json", cwd=there)
    found, expected = (json.loads(path.read_text()) for path in (there / "found.json", out / "results.json"))
    assert found["results"] == expected["results"]
    annotations = ["--annotations", shards.parent / "annotations.json", "--dataset", "demo", "--json", "scores.json"]
    re2tal("evaluate", "--predictions", "found.json", *annotations, cwd=there)
    summary = json.loads((out / "summary.json").read_text())
    assert json.loads((there / "scores.json").read_text())["average_map"] == pytest.approx(summary["average_map"])

    # A checkpoint from before paths were written absolute: resumed where it was begun.
    path = out / "checkpoints" / "step-00000012" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["run"]["backbone.weights"] = "swin.safetensors"
    path.write_text(json.dumps(manifest))
    re2tal("train", "--config", "run/config.json", "--out", "run", "--resume", cwd=here)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "evaluation"] == [6, 12], "a run that had ended logs it twice"
    with pytest.raises(RuntimeError, match=r"other\.safetensors"):
        re2tal(*again, "--backbone.weights", "other.safetensors", cwd=there)


def test_a_tracker_without_its_package_is_refused_before_anything_is_read(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["train", "--training.trackers", "comet_ml", "--out", str(tmp_path / "run")])
    assert "'comet_ml', whose package is not installed; run `pip install comet-ml`" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
