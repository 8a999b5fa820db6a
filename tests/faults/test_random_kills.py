"""kill -9 of a random rank at a random moment: the run that goes on ends with the same bits."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from data.feature_folders import write_features
from distributed.ranks import free_port
from safetensors.torch import load_file

from re2tal.distributed import World
from re2tal.structures import Action

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def features(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("features")
    for number, subset in enumerate(("training", "validation")):
        generator = torch.Generator().manual_seed(number)
        values = {f"{subset}{n}": torch.randn(12, 20 + n, generator=generator) for n in range(8)}
        write_features(folder / subset, values, actions=[Action(1.0, 3.0, "jump")], classes=("jump",))
    return folder


def started(ds: str, features: Path, out: Path) -> list[subprocess.Popen]:
    command = [sys.executable, str(ROOT / "launch" / "train.py"), "--ds", ds, "--data.shards", str(features)]
    command += ["--localizer.channels", "16", "--engine.batch-size", "1", "--data.clips.workers", "0"]
    command += ["--training.epochs", "10", "--training.checkpoint-every-steps", "1", "--schedule.warmup-epochs", "1"]
    command += ["--out", str(out), "--resume"]
    shared = {**os.environ, **World(world_size=2, master_port=free_port()).variables(), "OMP_NUM_THREADS": "1"}
    shared |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    with out.with_suffix(".log").open("a") as log:
        return [
            subprocess.Popen(
                command, env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=log, stderr=log
            )
            for rank in range(2)
        ]


def ended(processes: list[subprocess.Popen], log: Path) -> list[int]:
    try:
        return [process.wait(timeout=240) for process in processes]
    except subprocess.TimeoutExpired:
        raise AssertionError(log.read_text()[-4000:]) from None
    finally:
        for process in processes:
            process.kill()
            process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("ds", ["zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"])
def test_killed_at_random_moments_it_ends_with_the_same_bits(ds, features, tmp_path):
    assert ended(started(ds, features, tmp_path / "whole"), tmp_path / "whole.log") == [0, 0]
    out, dice = tmp_path / "killed", random.Random(ds)
    for _ in range(2):
        processes = started(ds, features, out)
        newest = out / "checkpoints" / "latest"
        before, deadline = newest.read_text() if newest.exists() else "", time.monotonic() + 150
        while not newest.exists() or newest.read_text() == before:  # it has come further than the one before it
            assert time.monotonic() < deadline, out.with_suffix(".log").read_text()[-4000:]
            time.sleep(0.02)
        time.sleep(dice.uniform(0.0, 1.0))
        victim = dice.randrange(2)
        processes[victim].send_signal(signal.SIGKILL)
        statuses = ended(processes, out.with_suffix(".log"))
        assert statuses[victim] in (-signal.SIGKILL, 0)  # 0: it was done before
    assert ended(started(ds, features, out), out.with_suffix(".log")) == [0, 0]
    expected, weights = (load_file(folder / "model.safetensors") for folder in (tmp_path / "whole", out))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
