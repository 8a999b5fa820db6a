"""kill -9 of a random rank at a random moment, inside saves too: the run that goes on ends with the same bits."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from distributed.forks import Fork
from distributed.ranks import PATIENCE
from faults.runs import end, ends_of, small, start_ranks, wait_for
from safetensors.torch import load_file

from re2tal.runs.exit_status import HUNG
from re2tal.training.checkpoint import CheckpointStore
from re2tal.training.watchdog import GONE_SECONDS

MOMENTS = ("start", "training", "training", "training", "training", "save 0", "save 0", "save 0", "save 1", "renamed")
"""Of the kills of one run: while it starts, while it trains and saves, at a random call of a save of one rank (rank 1
dies when rank 0 has written its files), and after the last rename of a save, before old checkpoints are removed."""

RANK = """
import sys
from faults.test_random_kills import dies
dies(sys.argv[1], int(sys.argv[2]))
from re2tal.cli import main
main(["train", *sys.argv[3:]])
"""


def dies(moment: str, seed: int) -> None:
    """Called in each rank: kills one of them inside its second save, or a later one."""
    victim = moment[-1] if moment.startswith("save") else "0"
    if os.environ["RANK"] != victim or moment in ("none", "start", "training"):
        return
    save, replace_file = CheckpointStore.save, os.replace
    saves, calls, last = [], [], random.Random(seed).randrange(1, 12 if victim == "0" else 4)

    def die() -> None:
        if moment == "save 1":
            time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGKILL)

    def counted(call):
        def wrapped(*given, **named):
            inside = len(saves) > 1
            calls.extend([call] * inside)
            if moment.startswith("save") and len(calls) == last:
                die()
            answer = call(*given, **named)
            if moment == "renamed" and inside and call is replace_file and str(given[1]).endswith("latest"):
                die()
            return answer

        return wrapped

    def counting(self, *given):
        saves.append(given)
        return save(self, *given)

    CheckpointStore.save = counting
    os.fsync, os.replace, os.mkdir = counted(os.fsync), counted(os.replace), counted(os.mkdir)


def started(ds: str, features: Path, out: Path, *, moment: str = "none", seed: int = 0) -> list[Fork]:
    log = out.with_suffix(".log")
    with log.open("a") as file:
        file.write(f"--- {moment} {seed}\n")
    if ds == "zero0":
        ds = str(out.with_suffix(".json"))
        Path(ds).write_text(json.dumps({"zero_optimization": {"stage": 0}}))
    options = ["--ds", ds, "--training.epochs", "8", "--training.checkpoint-every-steps", "1", "--resume"]
    options += ["--schedule.warmup-epochs", "1"]
    command = [sys.executable, "-c", RANK, moment, str(seed), *small(features, out, *options)]
    return start_ranks([command] * 2, [log] * 2)


def kill_one(processes: list[Fork], out: Path, *, moment: str, dice: random.Random) -> bool:
    """Whether a rank was killed, by itself inside a save or from here; and the other one ended in time."""
    newest, log = out / "checkpoints" / "latest", out.with_suffix(".log")
    before, victim = steps_of(newest), dice.randrange(2)
    if moment == "start":
        time.sleep(dice.uniform(0.0, 4.0))
    if moment == "training":
        wanted = before + dice.randrange(1, 5)
        wait_for(lambda: steps_of(newest) >= wanted, 900, log)
        time.sleep(dice.uniform(0.0, 0.2))
    if moment in ("start", "training"):
        processes[victim].kill()
    wait_for(lambda: any(process.poll() is not None for process in processes), 900, log)
    died = time.monotonic()
    if moment == "start":  # before the ranks have met, the one that is left waits for the other to start
        end(processes)
    statuses = ends_of(processes, log)
    assert time.monotonic() - died < GONE_SECONDS + PATIENCE * 50, log.read_text()[-4000:]
    assert moment == "start" or HUNG in statuses, log.read_text()[-4000:]
    return -signal.SIGKILL in statuses


def steps_of(newest: Path) -> int:
    return int(newest.read_text().strip().removeprefix("step-")) if newest.exists() else 0


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
