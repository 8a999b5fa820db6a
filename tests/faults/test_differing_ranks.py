"""Ranks that differ end before the first step, all of them, with the key and the hosts in words."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch
from distributed.ranks import PATIENCE, run_ranks
from faults.runs import ROOT, TRAIN, ends_of, small, start_ranks
from training.tiny import tiny_trainer

from re2tal.distributed import resolve_world
from re2tal.training.agreement import checksums
from re2tal.training.config import TrainingConfig
from re2tal.training.process_group import leave

EPOCHS = ["--training.epochs", "2", "--schedule.warmup-epochs", "0.5"]
SHIFTED = """
import os, sys, torch
from re2tal.runs import start
build = start.build_model
def shifted(*arguments):
    model = build(*arguments)
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1e-3
    return model
start.build_model = shifted
from re2tal.cli import main
main(["train", *sys.argv[1:]])
"""


def two_runs(commands: list[list[str]], folder: Path) -> tuple[list[int], list[str], float]:
    """Two ranks of one world, each with its command; how they ended, what they said, and after how long."""
    started, logs = time.monotonic(), [folder / f"log{rank}" for rank in range(2)]
    statuses = ends_of(start_ranks(commands, logs), logs[0], seconds=200)
    return statuses, [log.read_text() for log in logs], time.monotonic() - started


OTHER = {
    "learning rate": (["--optimizer.learning-rate", "0.0035"], r"optimizer.learning_rate: 0.\d+ on rank 0"),
    "seed": (["--training.seed", "7"], r"training.seed: 0 on rank 0 \(host .*\), 7 on rank 1 \(host .*\)"),
    "batch size": (["--engine.batch-size", "2"], r"engine.batch_size: 1 on rank 0 \(host .*\), 2 on rank 1"),
    "epochs": (["--training.epochs", "3"], r"training.epochs: 2 on rank 0"),
    "out": (["--out", "elsewhere"], r"out: \".*run\" on rank 0 \(host .*\), \".*elsewhere\" on rank 1"),
    "stage": (["--ds", "zero3"], r"DeepSpeed's zero_optimization.stage: 2 on rank 0 \(host .*\), 3 on rank 1"),
    "manifest": ([], r"training shards: \"\w{64}\" on rank 0 \(host .*\), \"\w{64}\" on rank 1"),
    "code": ([], r"version of re2tal: \".*source \w{16}\" on rank 0 .*, \".*source \w{16}\" on rank 1"),
    "weight": ([], r"weights of [\w.]+: -?\d+ on rank 0 \(host .*\), -?\d+ on rank 1"),
}


@pytest.mark.parametrize(
    "what", [name if name in ("batch size", "weight") else pytest.param(name, marks=pytest.mark.slow) for name in OTHER]
)
def test_ranks_that_differ_all_end_before_the_first_step_and_say_in_what(what, features, tmp_path):
    given, message = OTHER[what]
    base = [*TRAIN, "--ds", "zero2", *small(features, tmp_path / "run", *EPOCHS)]
    other = [*base, *given]
    match what:
        case "manifest":
            # As it would be on another host, under the same name: here rank 1 sees another folder in its place.
            shutil.copytree(features, tmp_path / "theirs")
            manifest = tmp_path / "theirs" / "training" / "manifest.json"
            document = json.loads(manifest.read_text())
            manifest.write_text(json.dumps(document, indent=1))
            redirect = "import re2tal.runs.training_data as t; o = t.open_any; import pathlib, sys; "
            redirect += f"t.open_any = lambda p: o(pathlib.Path({str(tmp_path / 'theirs')!r}) / p.name); "
            redirect += "from re2tal.cli import main; main(['train', *sys.argv[1:]])"
            other = [sys.executable, "-c", redirect, *base[2:]]
        case "code":
            shutil.copytree(ROOT / "re2tal", tmp_path / "code" / "re2tal")
            with (tmp_path / "code" / "re2tal" / "detector.py").open("a") as file:
                file.write("\n# another\n")
            start = f"import sys; sys.path.insert(0, {str(tmp_path / 'code')!r}); "
            other = [sys.executable, "-c", start + "from re2tal.cli import main; main(['train', *sys.argv[1:]])"]
            other += base[2:]
        case "weight":
            other = [sys.executable, "-c", SHIFTED, *base[2:]]
    statuses, said, seconds = two_runs([base, other], tmp_path)
    assert statuses == [2, 2], said
    for text in said:
        assert "Traceback" not in text
        assert "the ranks of this run differ in" in text
        assert re.search(message, text), text
    assert seconds < PATIENCE * 90
    assert not (tmp_path / "run" / "checkpoints").exists()


def drifts(folder: str, stage: int) -> dict:
    """One bit of one weight of rank 1 flips in the middle of the run."""
    world = resolve_world(os.environ)
    training = TrainingConfig(epochs=2, checkpoint_every_steps=3, log_every_steps=1)
    holder: list = []

    def on_batch(epoch: int, step: int) -> None:
        if (epoch, step) == (1, 1) and world.rank == 1:
            weight = next(holder[0].engine.module.parameters()).data.view(-1)
            weight.view(torch.int32)[5] ^= 1 << 12

    holder.append(tiny_trainer(folder, stage=stage, training=training, on_batch=on_batch))
    message = "no error"
    try:
        holder[0].train()
    except FloatingPointError as error:
        message = str(error)
    leave()
    return {"message": message, "kept": sorted(path.name for path in (Path(folder) / "checkpoints").glob("step-*"))}


def test_a_replica_that_drifts_is_named_and_never_saved(tmp_path):
    for of_rank in run_ranks(drifts, world_size=2, timeout_seconds=200, folder=str(tmp_path), stage=0):
        assert "after step 6 the weights of" in of_rank["message"]
        assert re.search(r"on rank 0 \(host .*\), rank 1 \(host .*\) differ from each other", of_rank["message"])
        assert of_rank["kept"] == ["step-00000003"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_any_flipped_bit_changes_a_checksum(dtype):
    tensor = torch.randn(7).to(dtype)
    before = checksums([tensor]).item()
    raw = tensor.view(torch.uint8)
    for place in range(len(raw)):
        for bit in range(8):
            raw[place] ^= 1 << bit
            assert checksums([tensor.clone()]).item() != before
            raw[place] ^= 1 << bit
