"""The trainer on two ranks: resume, skipped batches, requests to stop, broken writes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from distributed.ranks import run_ranks
from training.tiny import same, tiny_trainer, weights

from re2tal.distributed import is_main, resolve_world
from re2tal.runs.training_run import _closed_together
from re2tal.training.config import EngineConfig, TrainingConfig
from re2tal.training.interruption import Interrupted
from re2tal.training.metrics import MetricsLog
from re2tal.training.process_group import join, leave

CASES = [(2, "fp32"), (3, "fp32"), (2, "bf16")]
EVERY_THIRD = TrainingConfig(epochs=2, checkpoint_every_steps=3, keep_checkpoints=3, log_every_steps=1)


def resume_in_every_way(folder: str) -> dict:
    """Whole runs beside runs that stopped after step 3 and went on as new ones; which of them end alike."""
    alike = {}
    for stage, precision in CASES:
        place = Path(folder) / f"{stage}{precision}"
        whole = tiny_trainer(place / "whole", stage=stage, precision=precision, training=EVERY_THIRD)
        whole.train()
        expected, average = weights(whole), averaged(whole)
        before = tiny_trainer(place / "halved", stage=stage, precision=precision, training=EVERY_THIRD)
        before.train()
        if is_main():
            for name in ("step-00000006", "step-00000008"):
                shutil.rmtree(place / "halved" / "checkpoints" / name, ignore_errors=True)
        torch.distributed.barrier()
        torch.manual_seed(99)
        after = tiny_trainer(place / "halved", stage=stage, precision=precision, training=EVERY_THIRD)
        resumed = after.resume()
        start = after.progress.step
        ended = after.train()
        alike[f"{stage} {precision}"] = [
            resumed,
            start,
            ended,
            same(weights(after), expected),
            same(averaged(after), average),
            float(after.engine.module.seen) == float(whole.engine.module.seen),
        ]
    leave()
    return alike


def averaged(trainer) -> dict[str, torch.Tensor]:
    with trainer.averaged_weights():
        return weights(trainer)


def test_a_resumed_run_ends_bit_for_bit_like_an_uninterrupted_one(tmp_path):
    for of_rank in run_ranks(resume_in_every_way, world_size=2, timeout_seconds=280, folder=str(tmp_path)):
        assert of_rank == {f"{stage} {kind}": [True, 3, "finished", True, True, True] for stage, kind in CASES}


def poisoned(folder: str, stage: int) -> dict:
    """Rank 1 alone sees two batches of NaN in a row; with and without."""
    clean = tiny_trainer(Path(folder) / "clean", stage=stage, training=TrainingConfig(epochs=2))
    clean.train()
    sick = tiny_trainer(
        Path(folder) / "sick", stage=stage, training=TrainingConfig(epochs=2), poison=[(0, 2, 1), (0, 3, 1)]
    )
    ended = sick.train()
    finite = all(bool(value.isfinite().all()) for value in weights(sick).values())
    leave()
    return {
        "ended": ended,
        "finite": finite,
        "steps": sick.progress.step,
        "skipped": sick.progress.skipped,
        "drawn": [clean.progress.micro_batches, sick.progress.micro_batches],
    }


@pytest.mark.parametrize("stage", [0, 3])
def test_a_batch_that_is_not_finite_on_one_rank_is_passed_over_by_all(stage, tmp_path):
    for of_rank in run_ranks(poisoned, world_size=2, timeout_seconds=280, folder=str(tmp_path), stage=stage):
        assert of_rank == {"ended": "finished", "finite": True, "steps": 8, "skipped": 2, "drawn": [8, 10]}


def told_to_stop(folder: str) -> dict:
    """Rank 1 alone gets SIGTERM in the middle of its third step; then the run goes on."""

    def on_batch(epoch: int, step: int) -> None:
        if (epoch, step) == (0, 2) and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    first = tiny_trainer(folder, stage=2, on_batch=on_batch)
    ended = first.train()
    stopped_at = first.progress.step
    second = tiny_trainer(folder, stage=2)
    second.resume()
    resumed_at = second.progress.step
    again = second.train()
    restored = signal.getsignal(signal.SIGTERM) == before
    leave()
    return {"ended": ended, "steps": [stopped_at, resumed_at], "again": again, "restored": restored}


def test_a_rank_that_is_told_to_stop_stops_all_with_a_checkpoint(tmp_path):
    for of_rank in run_ranks(told_to_stop, world_size=2, timeout_seconds=280, folder=str(tmp_path)):
        assert of_rank == {"ended": "interrupted", "steps": [3, 3], "again": "finished", "restored": True}
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6, 7, 8]


def write_fails_on_one_rank(folder: str) -> dict:
    """Rank 1's disk is full at the second checkpoint."""
    trainer = tiny_trainer(folder, stage=2)
    trainer.checkpoints.pauses_seconds = ()
    engine = trainer.engine.checkpoint_engine
    save, calls = engine.save, []

    def full_disk(state_dict, path):
        calls.append(path)
        if os.environ["RANK"] == "1" and "step-00000006" in path:
            path = "/dev/full"
        save(state_dict, path)

    engine.save = full_disk
    message = "no error"
    try:
        trainer.train()
    except OSError as error:
        message = str(error)
    again = tiny_trainer(folder, stage=2)
    again.resume()
    left = sorted(path.name for path in (Path(folder) / "checkpoints").iterdir())
    leave()
    return {"message": message, "resumed_at": again.progress.step, "left": left}


def test_a_write_that_fails_on_one_rank_is_an_error_on_all_and_costs_no_checkpoint(tmp_path):
    for of_rank in run_ranks(write_fails_on_one_rank, world_size=2, timeout_seconds=280, folder=str(tmp_path)):
        assert "checkpoint step-00000006 was not written" in of_rank["message"]
        assert "No space left on device" in of_rank["message"]
        assert of_rank["resumed_at"] == 3
        assert of_rank["left"] == ["latest", "step-00000003"]


def close_slowly(folder: str, interrupted: bool) -> dict:
    """When this rank was let go, by a clock that all processes of a machine share."""
    join(resolve_world(os.environ), EngineConfig())
    log = MetricsLog(Path(folder), enabled=is_main())
    log.close = lambda: time.sleep(0.5) if is_main() else None
    with suppress(Interrupted), _closed_together(log):
        began = time.monotonic()
        if interrupted:
            raise Interrupted
    return {"waited": time.monotonic() - began}


@pytest.mark.parametrize("interrupted", [False, True])
def test_no_rank_ends_before_the_trackers_have(interrupted, tmp_path):
    """srun would kill rank 0 while it still sends figures, and the job would not be queued again."""
    for of_rank in run_ranks(close_slowly, world_size=2, folder=str(tmp_path), interrupted=interrupted):
        assert of_rank["waited"] > 0.4
