"""`accelerate launch`: two ranks that train together where it starts two, words where it would start one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from data.feature_folders import write_features
from distributed.ranks import free_port

from re2tal.distributed import World
from re2tal.structures import Action

ROOT = Path(__file__).parents[2]


@pytest.fixture
def accelerate(tmp_path):
    """Runs a training of two ranks by `accelerate launch` with more options."""
    for number, subset in enumerate(("training", "validation")):
        generator = torch.Generator().manual_seed(number)
        values = {f"{subset}{n}": torch.randn(12, 20 + n, generator=generator) for n in range(4)}
        write_features(tmp_path / "features" / subset, values, actions=[Action(1.0, 3.0, "jump")], classes=("jump",))

    def launch(*options: str) -> subprocess.CompletedProcess:
        command = [str(Path(sys.executable).parent / "accelerate"), "launch", "--num_processes", "2"]
        command += ["--num_machines", "1", "--dynamo_backend", "no", "--main_process_port", str(free_port()), *options]
        command += [str(ROOT / "launch" / "train.py"), "--ds", "zero2", "--data.shards", str(tmp_path / "features")]
        command += ["--localizer.channels", "16", "--engine.batch-size", "1", "--data.clips.workers", "0"]
        command += ["--training.epochs", "2", "--schedule.warmup-epochs", "0.5", "--out", str(tmp_path / "run")]
        alone = {name: value for name, value in os.environ.items() if name not in World().variables()}
        environment = {**alone, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=280)

    return launch


def test_where_it_starts_two_ranks_they_train_together(accelerate, tmp_path):
    done = accelerate("--multi_gpu", "--mixed_precision", "no")
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["ranks"] == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--cpu", "--mixed_precision", "no"], "told it no rank, as it does on a CPU"),
        (["--multi_gpu", "--mixed_precision", "bf16"], "'ACCELERATE_MIXED_PRECISION': 'bf16'}, which would be ignored"),
    ],
)
def test_what_would_be_ignored_is_refused_in_words(accelerate, tmp_path, options, words):
    done = accelerate(*options)
    assert done.returncode != 0
    assert words in done.stderr
    assert not (tmp_path / "run").exists()
