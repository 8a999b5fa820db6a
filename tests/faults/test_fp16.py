"""fp16 with its loss scale: an overflow on one rank is agreed on, named and counted, and a resumed run keeps the scale.

DeepSpeed and this program refuse fp16 on most CPUs, where it is only slow: here both are told otherwise.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import deepspeed
import torch
from distributed.ranks import run_ranks
from training.tiny import TinyDetector, same, tiny_trainer, weights

from re2tal.distributed import resolve_world
from re2tal.training import zero_file
from re2tal.training.config import TrainingConfig
from re2tal.training.process_group import leave
from re2tal.training.skips import LOSS_SCALE_SEARCH

TRAINING = TrainingConfig(epochs=2, log_every_steps=1, checkpoint_every_steps=4, keep_checkpoints=3)


class Overflowing(TinyDetector):
    """In the forwards that `bad` names, the gradient is beyond fp16, or not finite, on rank 1 alone."""

    place, factor, bad = "gradient", 1.0, ()

    def loss(self, outputs, actions, timelines, *, num_frames):
        self.forwards = getattr(self, "forwards", 0) + 1
        losses = super().loss(outputs, actions, timelines, num_frames=num_frames)
        if self.forwards in self.bad and resolve_world(os.environ).rank == 1:
            if self.place == "loss":
                losses["total"] = losses["total"] + self.factor
            else:
                outputs.values.register_hook(lambda gradient: gradient * self.factor)
        return losses


def allow_fp16() -> None:
    type(deepspeed.get_accelerator()).is_fp16_supported = lambda self: True
    zero_file._refuse_contradictions = lambda *given: None


def trainer_of(folder: Path, stage: int, scale: dict, training: TrainingConfig = TRAINING):
    """Its first loss scale is small, so that nothing overflows by itself."""
    allow_fp16()
    resolve = zero_file._read
    zero_file._read = lambda path: {**resolve(path), "fp16": {"enabled": True, "hysteresis": 1, **scale}}
    try:
        return tiny_trainer(folder, stage=stage, precision="fp16", build=Overflowing, training=training)
    finally:
        zero_file._read = resolve


CASES = {
    "gradient 1e30": ("gradient", 1e30),  # beyond 65504 in fp16
    "gradient inf": ("gradient", torch.inf),
    "gradient nan": ("gradient", torch.nan),
    "loss inf": ("loss", torch.inf),
    "loss nan": ("loss", torch.nan),
}


def overflown(folder: str, stage: int) -> dict:
    """One run a case, whose third and fourth forward are bad on rank 1."""
    answers = {}
    for name, (place, factor) in CASES.items():
        Overflowing.place, Overflowing.factor, Overflowing.bad = place, factor, (3, 4)
        trainer = trainer_of(Path(folder) / name, stage, {"initial_scale_power": 8})
        said: list[str] = []
        trainer.log.say = said.append
        ended = trainer.train()
        answers[name] = {
            "ended": ended,
            "finite": all(bool(value.isfinite().all()) for value in weights(trainer).values()),
            "skipped": trainer.progress.skipped,
            "said": [line for line in said if line.startswith("skipped")],
            "scale": float(trainer.engine.optimizer.loss_scale),
        }
    leave()
    return answers


def test_an_overflow_on_one_rank_is_agreed_on_named_and_counted(tmp_path, record_property):
    record_property("tried", len(CASES))
    ranks = run_ranks(overflown, world_size=2, timeout_seconds=280, folder=str(tmp_path), stage=2)
    for of_rank in ranks:
        for case, answer in of_rank.items():
            assert (answer["ended"], answer["finite"], answer["skipped"]) == ("finished", True, 2), case
            assert answer["scale"] == 2**8 / 4, case  # halved twice, on both ranks
            assert len(answer["said"]) == 2, case
            for line in answer["said"]:
                assert "rank 1 (host" in line, line
                assert "rank 0 (host" not in line, line
                assert "video0_2_0" in line or "video0_3_0" in line, line


def at_the_smallest_scale(folder: str, stage: int) -> dict:
    """All gradients of rank 1 overflow, whatever the scale."""
    Overflowing.place, Overflowing.factor, Overflowing.bad = "gradient", torch.inf, range(1000)
    training = TrainingConfig(epochs=50, log_every_steps=1, max_non_finite=2)
    trainer = trainer_of(Path(folder), stage, {"initial_scale_power": 2}, training)
    message = "finished"
    try:
        trainer.train()
    except FloatingPointError as error:
        message = str(error)
    scale = float(trainer.engine.optimizer.loss_scale)
    leave()
    return {"message": message, "scale": scale, "skipped": trainer.progress.skipped}


def test_a_scale_that_can_fall_no_further_ends_the_run_in_words_on_all_ranks(tmp_path):
    limit = LOSS_SCALE_SEARCH + 2
    for of_rank in run_ranks(at_the_smallest_scale, world_size=2, timeout_seconds=200, folder=str(tmp_path), stage=2):
        assert (of_rank["scale"], of_rank["skipped"]) == (1.0, limit)
        assert f"{limit} batches or steps in a row were not finite" in of_rank["message"]
        assert "the loss scale is 1 now" in of_rank["message"]
        assert "rank 1 (host " in of_rank["message"]


def resumed(folder: str, stage: int) -> dict:
    """The scale falls at the third forward and rises every third step; the run is left after step 4, and goes on."""
    scale = {"initial_scale_power": 8, "loss_scale_window": 3}
    Overflowing.place, Overflowing.factor, Overflowing.bad = "gradient", torch.inf, (3,)
    whole = trainer_of(Path(folder) / "whole", stage, scale)
    whole.train()
    expected, scales = weights(whole), [float(whole.engine.optimizer.loss_scale)]
    first = trainer_of(Path(folder) / "halved", stage, scale)
    save = first.checkpoints.save
    first.checkpoints.save = lambda engine, average, progress: progress.step <= 4 and save(engine, average, progress)
    first.train()
    Overflowing.bad = ()
    second = trainer_of(Path(folder) / "halved", stage, scale)
    at = second.resume() and second.progress.step
    scales.append(float(second.engine.optimizer.loss_scale))
    second.train()
    scales.append(float(second.engine.optimizer.loss_scale))
    alike = same(weights(second), expected)
    leave()
    return {"at": at, "scales": scales, "alike": alike}


def test_a_resumed_run_goes_on_with_the_loss_scale_it_had(tmp_path):
    for of_rank in run_ranks(resumed, world_size=2, timeout_seconds=280, folder=str(tmp_path), stage=2):
        first, at_resume, last = of_rank["scales"]
        assert (of_rank["at"], of_rank["alike"]) == (4, True), json.dumps(of_rank)
        assert at_resume not in (2**8, 2**16)
        assert first == last
