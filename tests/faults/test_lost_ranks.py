"""A rank that is stopped, killed or hangs is named by the others, within the limit, and the run ends."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path

import pytest
from distributed.forks import Fork
from distributed.ranks import PATIENCE
from faults.runs import end, ends_of, small, start_ranks, wait_for

from re2tal.runs.exit_status import HUNG
from re2tal.training.verdict import Report, judge

LIMIT_SECONDS = PATIENCE * 10.0

FAULTY = """
import os, sys, time
rank, fault, limit = os.environ["RANK"], sys.argv.pop(1), float(sys.argv.pop(1))
from re2tal.training.trainer import Trainer
from re2tal.training.checkpoint import CheckpointStore
from re2tal.training.checkpoint_files import DurableCheckpointEngine
losses, batches = Trainer._forward, Trainer._batches
digests, write = CheckpointStore._digests, DurableCheckpointEngine.save
def late(self, batch):
    if self.progress.step == 3:
        print("here", flush=True)
        if fault == "sleeps" and rank == "1" or fault == "sleeps alone":
            time.sleep(1e6)
        if fault in ("stopped", "killed"):
            time.sleep(0.2)
            self.progress = type(self.progress)(step=3, micro_batches=3)  # goes on for ever
    return losses(self, batch)
def slow(self, partial):
    if fault == "slow save" and rank == "0":
        time.sleep(1.6 * limit)
    return digests(self, partial)
def late_batches(self):
    for number, batch in enumerate(batches(self)):
        if fault == "slow loader" and rank == "1" and number in (2, 3, 5):
            time.sleep(0.7 * limit)
        if fault == "hung loader" and rank == "1" and number == 3:
            print("here", flush=True)
            time.sleep(1e6)
        yield batch
def stalled(self, state_dict, path):
    if fault == "stalled disk" and rank == "1":
        os.mkfifo(path)  # nobody reads it: to open it waits in the kernel, as for a server that does not answer
        print("here", flush=True)
    return write(self, state_dict, path)
Trainer._forward, CheckpointStore._digests, Trainer._batches = late, slow, late_batches
DurableCheckpointEngine.save = stalled
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
    # Nor is a rank hung that others wait for while it makes progress, as one with a slow loader does, for a while.
    moving = report("step 7, waiting for its loader", 29, stays=7.0)
    assert judge([waiting, moving], [0.1, 0.1], limit_seconds=10.0) is None
    endless = report("step 7, backward", 30, stays=31.0, waits=30.5)
    assert "rank 1" in str(judge([endless, moving], [0.1, 0.1], limit_seconds=10.0))
    silent = judge([waiting, busy], [11.0, 0.1], limit_seconds=10.0)
    assert str(silent).startswith("rank 0 (host gpu1, at 'step 7, backward') gave no sign of life for 11 s")


def started(fault: str, features: Path, folder: Path, *, ranks: int = 2) -> list[Fork]:
    options = ["--ds", "zero2", "--training.epochs", "2", "--schedule.warmup-epochs", "0.5"]
    options += ["--engine.timeout-minutes", str(LIMIT_SECONDS / 60)]
    command = [sys.executable, "-c", FAULTY, fault, str(LIMIT_SECONDS), *small(features, folder / "run", *options)]
    return start_ranks([command] * ranks, logs_of(folder)[:ranks])


def logs_of(folder: Path) -> list[Path]:
    return [folder / f"log{rank}" for rank in range(2)]


def wait_until_here(victim: int, folder: Path, processes: list[Fork]) -> None:
    log = folder / f"log{victim}"

    def ended() -> bool:
        return any(process.poll() is not None for process in processes)

    wait_for(lambda: "here" in log.read_text() or ended(), 250, *logs_of(folder))
    assert not ended(), [each.read_text()[-3000:] for each in logs_of(folder)]


CASES = [(fault, victim) for fault in ("stopped", "killed") for victim in (0, 1)]


@pytest.mark.parametrize(
    ("fault", "victim"), [("sleeps", 1), *(pytest.param(*case, marks=pytest.mark.slow) for case in CASES)]
)
def test_a_lost_rank_is_named_by_the_other(fault, victim, features, tmp_path):
    processes = started(fault, features, tmp_path)
    try:
        wait_until_here(victim, tmp_path, processes)
        began = time.monotonic()
        match fault:
            case "stopped":
                processes[victim].send_signal(signal.SIGSTOP)
            case "killed":
                processes[victim].kill()
        other = processes[1 - victim]
        wait_for(lambda: other.poll() is not None, 150, *logs_of(tmp_path))
        took = time.monotonic() - began
        said = (tmp_path / f"log{1 - victim}").read_text()
        assert other.returncode == HUNG, said[-3000:]
        assert f"rank {victim} (host " in said, said[-3000:]
        assert "Traceback" not in said
        assert took < PATIENCE * 60  # the limit, a few beats, and a busy machine
        if fault != "killed":
            stacks = tmp_path / "run" / "stacks"
            assert "train" in (stacks / f"rank-{1 - victim:05d}.txt").read_text()
        if fault == "sleeps":  # the one that hangs ends itself, with its stack
            assert processes[victim].wait(timeout=PATIENCE * 60) == HUNG
            assert "in late" in (stacks / f"rank-{victim:05d}.txt").read_text()
    finally:
        end(processes)


@pytest.mark.slow
def test_a_lost_rank_without_others_ends_itself_but_not_for_being_stopped_for_a_while(features, tmp_path):
    [process] = started("sleeps alone", features, tmp_path, ranks=1)
    log = tmp_path / "log0"
    try:
        wait_for(lambda: "here" in log.read_text() or process.poll() is not None, 250, log)
        process.send_signal(signal.SIGSTOP)
        time.sleep(1.5 * LIMIT_SECONDS)
        process.send_signal(signal.SIGCONT)
        time.sleep(0.3 * LIMIT_SECONDS)
        assert process.poll() is None, log.read_text()[-3000:]
        wait_for(lambda: process.poll() is not None, 60, log)
        assert process.returncode == HUNG
        assert "at 'step 3, waiting for its loader', and the run ends. Its stacks are in" in log.read_text()
        assert "in late" in (tmp_path / "run" / "stacks" / "rank-00000.txt").read_text()
    finally:
        end([process])


def run_until_it_hangs(fault: str, features: Path, folder: Path) -> list[str]:
    """What the ranks said of a run in which rank 1 hangs, after both have ended."""
    statuses = ends_of(started(fault, features, folder), folder / "log0")
    said = [log.read_text() for log in logs_of(folder)]
    assert "here" in said[1]
    assert statuses == [HUNG, HUNG], said
    assert "Traceback" not in said[0] + said[1]
    return said


@pytest.mark.slow
def test_a_loader_that_hangs_is_named_with_its_rank(features, tmp_path):
    for said in run_until_it_hangs("hung loader", features, tmp_path):
        assert "rank 1 (host " in said
        assert "at 'step 3, waiting for its loader') holds up the others for" in said, said[-3000:]
    assert "in late_batches" in (tmp_path / "run" / "stacks" / "rank-00001.txt").read_text()


@pytest.mark.slow
def test_a_disk_that_stalls_ends_the_run_and_is_named(features, tmp_path):
    for said in run_until_it_hangs("stalled disk", features, tmp_path):
        assert "rank 1 (host " in said
        assert "at 'the checkpoint of step 8') holds up the others for" in said, said[-3000:]
    assert "in save" in (tmp_path / "run" / "stacks" / "rank-00001.txt").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["slow save", "slow loader"])
def test_a_rank_that_is_slow_is_waited_for(fault, features, tmp_path):
    assert ends_of(started(fault, features, tmp_path), tmp_path / "log0") == [0, 0], (tmp_path / "log0").read_text()
