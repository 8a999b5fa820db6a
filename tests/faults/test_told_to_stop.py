"""Real signals in every phase of a run: it ends as interrupted, and the resumed run as if there had been none."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed.ranks import PATIENCE, run_ranks
from faults.runs import TRAIN, alone, end, small, wait_for
from safetensors.torch import load_file

from re2tal import inference
from re2tal.cli.train import train
from re2tal.config import RunConfig
from re2tal.localizers.pyramid.config import PyramidConfig
from re2tal.recipes import find_recipe
from re2tal.runs import training_end, training_run
from re2tal.runs.exit_status import INTERRUPTED
from re2tal.training.checkpoint import CheckpointStore
from re2tal.training.process_group import leave
from re2tal.training.signals import STOP_SIGNALS
from re2tal.training.trainer import Trainer

PHASES: list[tuple[str, Any, str, int, int]] = [
    ("start-up", training_run, "open_both", 1, 1),
    ("the first step", Trainer, "_forward", 1, 1),
    ("training", Trainer, "_forward", 2, 1),
    ("an evaluation on the way", inference, "detector_input", 2, 1),
    ("the evaluation that was left", inference, "detector_input", 1, 1),
    ("a checkpoint", CheckpointStore, "_digests", 1, 1),
    ("the end of training", training_run, "finish", 1, 1),
    ("the last evaluation", inference, "detector_input", 3, 1),
    ("the export", training_end, "write_model", 1, 0),
]
"""Phase, whose function is called in it, the function, the call in which the signal comes, and the rank it goes to."""


def small_run(features: str) -> RunConfig:
    """Two epochs of four steps, with checkpoints after steps 3, 6 and 8 and an evaluation after step 4."""
    run = find_recipe("demo")
    assert isinstance(run, RunConfig)
    assert isinstance(run.localizer, PyramidConfig)
    return replace(
        run,
        data=replace(run.data, shards=Path(features), clips=replace(run.data.clips, workers=0)),
        localizer=replace(run.localizer, channels=16),
        engine=replace(run.engine, batch_size=1, timeout_minutes=2),
        schedule=replace(run.schedule, warmup_epochs=0.5),
        training=replace(run.training, epochs=2, checkpoint_every_steps=3, evaluate_every_epochs=1, log_every_steps=1),
    )


def interrupted_in_every_phase(features: str, folder: str, first: int) -> dict[str, int]:
    """Phase -> how the run ended that got a signal in it; each goes on with what the one before it left.

    The kinds of signals come in turn, from number `first` on.
    """
    run, rank = small_run(features), int(os.environ["RANK"])
    training_run.leave = lambda: None  # the ranks stay together for the next run
    train(run=run, ds="zero2", out=Path(folder) / "whole")
    ended = {}
    for place, (phase, home, name, when, receiver) in enumerate(PHASES):
        number, calls, function = STOP_SIGNALS[(first + place) % len(STOP_SIGNALS)], [], getattr(home, name)

        def signalled(*given, **named):
            calls.append(name)  # noqa: B023
            if len(calls) == when and rank == receiver:  # noqa: B023
                os.kill(os.getpid(), number)  # noqa: B023
            return function(*given, **named)  # noqa: B023

        setattr(home, name, signalled)
        ended[phase] = train(run=run, ds="zero2", out=Path(folder) / "halved", resume=True)
        setattr(home, name, function)
    ended["none"] = train(run=run, ds="zero2", out=Path(folder) / "halved", resume=True)
    leave()
    return ended


@pytest.mark.parametrize("first", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_signal_in_any_phase_is_heard_by_all_ranks_and_changes_nothing(first, features, tmp_path, record_property):
    record_property("tried", len(PHASES))
    expected = {**{phase: INTERRUPTED for phase, *_ in PHASES}, "none": 0}
    given = {"features": str(features), "folder": str(tmp_path), "first": first}
    for of_rank in run_ranks(interrupted_in_every_phase, world_size=2, timeout_seconds=280, **given):
        assert of_rank == expected
    whole, halved = tmp_path / "whole", tmp_path / "halved"
    weights, resumed = load_file(whole / "model.safetensors"), load_file(halved / "model.safetensors")
    assert weights.keys() == resumed.keys()
    assert all(torch.equal(weights[name], resumed[name]) for name in weights)
    assert (whole / "results.json").read_bytes() == (halved / "results.json").read_bytes()
    logs = [(folder / "metrics.jsonl").read_text().splitlines() for folder in (whole, halved)]
    courses = [[(row["step"], row["kind"], row.get("loss")) for row in map(json.loads, log)] for log in logs]
    assert courses[0] == courses[1]


def listens_for(process: subprocess.Popen, number: int) -> bool:
    """Whether the process has a handler of its own for a signal."""
    assert process.poll() is None
    caught = next(
        line for line in Path(f"/proc/{process.pid}/status").read_text().splitlines() if line.startswith("SigCgt")
    )
    return bool(int(caught.split()[1], 16) >> (number - 1) & 1)


def test_a_run_listens_before_it_imports_anything_slow(features, tmp_path):
    process = subprocess.Popen([*TRAIN, *small(features, tmp_path / "run")], env=alone())
    try:
        wait_for(lambda: listens_for(process, signal.SIGUSR1), 60)
        assert "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text()
        process.send_signal(signal.SIGUSR1)
        assert process.wait(timeout=PATIENCE * 120) == INTERRUPTED
    finally:
        end([process])
