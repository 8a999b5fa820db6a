"""What commands say when they are done."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from re2tal.cli.say import say_trained
from re2tal.config import save_config
from re2tal.recipes import find_recipe
from re2tal.runs.training_end import TrainedRun

SUMMARY = {"average_map": 0.5, "protocol": "official", "subset": "test"}


def next_of(recipe: str, folder: Path, capsys: pytest.CaptureFixture[str], **rules: Any) -> list[str]:
    """The commands that come after a run."""
    run = find_recipe(recipe)
    save_config(folder / "config.json", replace(run, evaluation=replace(run.evaluation, **rules)))
    say_trained(TrainedRun(folder, interrupted=False, summary=SUMMARY))
    return capsys.readouterr().out.split("next:\n")[1].splitlines()


def test_the_next_evaluation_scores_as_the_run_did(tmp_path, capsys):
    folder = tmp_path / "a run"
    *_, plain = next_of("demo", folder, capsys)
    assert plain.endswith("a run'/results.json --annotations annotations.json")
    *_, line = next_of(
        "activitynet_re2swin_tiny", folder, capsys, protocol="official", blocked_videos=Path("/a b.json")
    )
    assert line.endswith(" --protocol official --dataset activitynet --blocked-videos '/a b.json' --class-agnostic")
    *_, line = next_of("demo", folder, capsys, tiou_thresholds=(0.25, 0.5))
    assert line.endswith(" annotations.json --tiou-thresholds 0.25 0.5")


def test_a_detector_of_features_is_shown_features(tmp_path, capsys):
    _, line, _ = next_of("thumos14_actionformer_features", tmp_path, capsys)
    assert line == f"    re2tal detect --shards FEATURES --model {tmp_path}"
