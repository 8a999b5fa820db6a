"""A rank that is stopped, killed or hangs is named by the others, within the limit, and the run ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from data.feature_folders import write_features
from distributed.ranks import free_port

from re2tal.distributed import World
from re2tal.runs.exit_status import HUNG
from re2tal.structures import Action
from re2tal.training.watchdog import Report, judge

ROOT = Path(__file__).parents[2]
LIMIT_SECONDS = 6.0

FAULTY = """
import os, sys, time
rank, fault, limit = os.environ["RANK"], sys.argv.pop(1), float(sys.argv.pop(1))
from re2tal.training.trainer import Trainer
from re2tal.training.checkpoint import CheckpointStore
losses, digests = Trainer._forward, CheckpointStore._digests
def late(self, batch):
    if self.progress.step == 3:
        print("here", flush=True)
        if fault == "sleeps" and rank == "1":
            time.sleep(1e6)
        if fault in ("stopped", "killed"):
            time.sleep(0.2)
            self.progress = type(self.progress)(step=3, micro_batches=3)  # goes on for ever
    return losses(self, batch)
def slow(self, partial):
    if fault == "slow save" and rank == "0":
        time.sleep(1.6 * limit)
    return digests(self, partial)
Trainer._forward, CheckpointStore._digests = late, slow
from re2tal.cli import main
main(["train", *sys.argv[1:]])
"""


def report(phase: str, progress: int, *, stays: float = 0.0, waits: float = 0.0, patient: bool = False) -> Report:
    return Report("gpu1", phase, patient, progress, stays, waits)


def test_the_rank_that_the_others_wait_for_is_blamed():
    waiting, busy = report("step 7, backward", 30, stays=11.0, waits=10.5), report("step 7, forward", 29, stays=12.0)
    assert judge([waiting, busy], [0.1, 0.1], limit_seconds=20.0) is None
    blamed = judge([waiting, busy], [0.1, 0.1], limit_seconds=10.0)
    assert blamed == "rank 1 (host gpu1, at 'step 7, forward') holds up the others for 11 s"
    # A compilation or a save may take three times as long on one rank.
    patient = report("the checkpoint of step 7", 29, stays=12.0, patient=True)
    assert judge([waiting, patient], [0.1, 0.1], limit_seconds=10.0) is None
    # Devices that wait leave their hosts in no collective: the rank that is behind is blamed.
    ahead = report("step 7, backward", 30, stays=11.0)
    assert "rank 1" in str(judge([ahead, busy], [0.1, 0.1], limit_seconds=10.0))
    assert "none is behind" in str(judge([waiting, waiting], [0.1, 0.1], limit_seconds=10.0))
    # Progress on one rank, such as reading the weights of a large model, is no hang while nobody waits.
    assert judge([report("step 8, forward", 31), busy], [0.1, 0.1], limit_seconds=10.0) is None
    silent = judge([waiting, busy], [11.0, 0.1], limit_seconds=10.0)
    assert str(silent).startswith("rank 0 (host gpu1, at 'step 7, backward') gave no sign of life for 11 s")


@pytest.fixture(scope="module")
def features(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("features")
    for number, subset in enumerate(("training", "validation")):
        generator = torch.Generator().manual_seed(number)
        values = {f"{subset}{n}": torch.randn(12, 20 + n, generator=generator) for n in range(8)}
        write_features(folder / subset, values, actions=[Action(1.0, 3.0, "jump")], classes=("jump",))
    return folder


def started(fault: str, features: Path, folder: Path) -> list[subprocess.Popen]:
    command = [sys.executable, "-c", FAULTY, fault, str(LIMIT_SECONDS), "--ds", "zero2", "--data.shards", str(features)]
    command += ["--localizer.channels", "16", "--engine.batch-size", "1", "--data.clips.workers", "0"]
    command += ["--training.epochs", "2", "--schedule.warmup-epochs", "0.5", "--out", str(folder / "run")]
    command += ["--engine.timeout-minutes", str(LIMIT_SECONDS / 60)]
    shared = {**os.environ, **World(world_size=2, master_port=free_port()).variables(), "OMP_NUM_THREADS": "1"}
    shared |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    processes = []
    for rank in range(2):
        with (folder / f"log{rank}").open("w") as log:
            environment = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
    return processes


def wait_for(condition, folder: Path, running: Sequence[subprocess.Popen] = ()) -> None:
    deadline = time.monotonic() + 150
    while not condition():
        logs = [(folder / f"log{rank}").read_text()[-3000:] for rank in range(2)]
        ended = any(process.poll() is not None for process in running)
        assert not ended, "\n---\n".join(logs)
        assert time.monotonic() < deadline, "\n---\n".join(logs)
        time.sleep(0.1)


CASES = [("stopped", 0), ("stopped", 1), ("killed", 0), ("killed", 1)]


@pytest.mark.parametrize(
    ("fault", "victim"), [("sleeps", 1), *(pytest.param(*case, marks=pytest.mark.slow) for case in CASES)]
)
def test_a_lost_rank_is_named_by_the_other(fault, victim, features, tmp_path):
    processes = started(fault, features, tmp_path)
    try:
        wait_for(lambda: "here" in (tmp_path / f"log{victim}").read_text(), tmp_path, processes)
        began = time.monotonic()
        match fault:
            case "stopped":
                processes[victim].send_signal(signal.SIGSTOP)
            case "killed":
                processes[victim].kill()
        other = processes[1 - victim]
        wait_for(lambda: other.poll() is not None, tmp_path)
        took = time.monotonic() - began
        said = (tmp_path / f"log{1 - victim}").read_text()
        assert other.returncode == HUNG, said[-3000:]
        assert f"rank {victim} (host " in said, said[-3000:]
        assert "Traceback" not in said
        assert took < 60  # the limit, a few beats, and a busy machine
        if fault != "killed":
            stacks = tmp_path / "run" / "stacks"
            assert "train" in (stacks / f"rank-{1 - victim:05d}.txt").read_text()
        if fault == "sleeps":  # the one that hangs ends itself, with its stack
            assert processes[victim].wait(timeout=60) == HUNG
            assert "in late" in (stacks / f"rank-{victim:05d}.txt").read_text()
    finally:
        for process in processes:
            process.kill()
            process.wait()


@pytest.mark.slow
def test_a_save_that_is_slow_on_one_rank_is_waited_for(features, tmp_path):
    processes = started("slow save", features, tmp_path)
    try:
        wait_for(lambda: None not in [process.poll() for process in processes], tmp_path)
        assert [process.returncode for process in processes] == [0, 0], (tmp_path / "log0").read_text()[-3000:]
    finally:
        for process in processes:
            process.kill()
            process.wait()
