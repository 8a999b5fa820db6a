"""kill -9 of a random rank at a random moment, inside saves too: the run that goes on ends with the same bits."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from faults.runs import end, ends_of, small, start_ranks, wait_for
from safetensors.torch import load_file

from re2tal.training.watchdog import GONE_SECONDS

MOMENTS = ("start", "training", "training", "training", "training", "save 0", "save 0", "save 0", "save 1", "renamed")
"""Of the kills of one run: while it starts, while it trains and saves, at a random call of a save of one rank (rank 1
dies when rank 0 has written its files), and after the last rename of a save, before old checkpoints are removed."""

RUN = """
import os, random, signal, sys, time
moment, seed = sys.argv.pop(1), int(sys.argv.pop(1))
from re2tal.training.checkpoint import CheckpointStore
save, calls, left = CheckpointStore.save, [], random.Random(seed).randrange(2, 12 if moment == "save 0" else 4)
def die():
    if moment == "save 1":
        time.sleep(0.3)
    os.kill(os.getpid(), signal.SIGKILL)
def counted(call):
    def wrapped(*given, **named):
        if moment.startswith("save") and calls:
            calls.append(call)
            if len(calls) == left:
                die()
        answer = call(*given, **named)
        if moment == "renamed" and calls and call is replace and str(given[1]).endswith("latest"):
            die()
        return answer
    return wrapped
replace = os.replace
def second_save(self, *given):
    global saves
    saves += 1
    if saves > 1:
        calls.append(save)
    return save(self, *given)
saves = 0
victim = moment[-1] if moment.startswith("save") else "0"
if os.environ["RANK"] == victim:
    CheckpointStore.save = second_save
    os.fsync, os.replace, os.mkdir = counted(os.fsync), counted(os.replace), counted(os.mkdir)
from re2tal.cli import main
main(["train", *sys.argv[1:]])
"""


def started(ds: str, features: Path, out: Path, *, moment: str = "none", seed: int = 0) -> list[subprocess.Popen]:
    log = out.with_suffix(".log")
    with log.open("a") as file:
        file.write(f"--- {moment} {seed}\n")
    if ds == "zero0":
        ds = str(out.with_suffix(".json"))
        Path(ds).write_text(json.dumps({"zero_optimization": {"stage": 0}}))
    options = ["--ds", ds, "--training.epochs", "40", "--training.checkpoint-every-steps", "1", "--resume"]
    options += ["--schedule.warmup-epochs", "1"]
    command = [sys.executable, "-c", RUN, moment, str(seed), *small(features, out, *options)]
    return start_ranks([command] * 2, [log] * 2)


def kill_one(processes: list[subprocess.Popen], out: Path, *, moment: str, dice: random.Random) -> bool:
    """Whether a rank was killed, by itself inside a save or from here; and the other one ended in time."""
    newest, log = out / "checkpoints" / "latest", out.with_suffix(".log")
    before = newest.read_text() if newest.exists() else ""
    if moment == "start":
        time.sleep(dice.uniform(0.0, 8.0))
    if moment == "training":
        # It has come further than the one before it.
        wait_for(lambda: newest.exists() and newest.read_text() != before, 150, log)
        time.sleep(dice.uniform(0.0, 1.0))
    if moment in ("start", "training"):
        processes[dice.randrange(2)].send_signal(signal.SIGKILL)
    wait_for(lambda: any(process.poll() is not None for process in processes), 150, log)
    died = time.monotonic()
    if moment == "start":  # before the ranks have met, the one that is left waits for the other to start
        end(processes)
    statuses = ends_of(processes, log)
    assert time.monotonic() - died < GONE_SECONDS + 50, log.read_text()[-4000:]
    return -signal.SIGKILL in statuses


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("ds", ["zero0", "zero1", "zero2", "zero3", "zero2_offload"])
def test_killed_at_random_moments_it_ends_with_the_same_bits(ds, features, tmp_path, record_property):
    assert ends_of(started(ds, features, tmp_path / "whole"), tmp_path / "whole.log") == [0, 0]
    expected, held = load_file(tmp_path / "whole" / "model.safetensors"), 0
    record_property("tried", len(MOMENTS))
    out, dice = tmp_path / "killed", random.Random(ds)
    for number, moment in enumerate(MOMENTS):
        processes = started(ds, features, out, moment=moment, seed=number)
        held += kill_one(processes, out, moment=moment, dice=dice)
    assert held == len(MOMENTS), out.with_suffix(".log").read_text()[-4000:]
    assert ends_of(started(ds, features, out), out.with_suffix(".log")) == [0, 0]
    weights = load_file(out / "model.safetensors")
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
