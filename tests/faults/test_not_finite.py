"""NaN and infinity on one rank: skipped on all, named, counted; in no weight and no checkpoint."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from distributed.ranks import run_ranks
from training.tiny import TinyDetector, tiny_trainer, weights

from re2tal.distributed import resolve_world
from re2tal.training.config import TrainingConfig
from re2tal.training.engine_weights import master_weights
from re2tal.training.process_group import leave

PLACES = ("loss", "gradient")
BAD = {"nan": torch.nan, "inf": torch.inf}


class Faulty(TinyDetector):
    """In the forwards that `bad` names the loss, or only its gradient, is not finite on rank 1."""

    place, value, bad = "", 0.0, ()

    def loss(self, outputs, actions, timelines, *, num_frames):
        self.forwards = getattr(self, "forwards", 0) + 1
        losses = super().loss(outputs, actions, timelines, num_frames=num_frames)
        if self.forwards in self.bad and resolve_world(os.environ).rank == 1:
            if self.place == "loss":
                losses["total"] = losses["total"] + self.value  # whose gradients are finite
            else:
                outputs.values.register_hook(lambda gradient: gradient * self.value)
        return losses


def poisoned(folder: str, stage: int, precision: str, accumulation: int) -> dict:
    """One run a case, the third and the fourth forward bad."""
    answers = {}
    for place in PLACES:
        for name, value in BAD.items():
            Faulty.place, Faulty.value, Faulty.bad = place, value, (3, 4)
            here = Path(folder) / f"{place}{name}"
            said: list[str] = []
            trainer = tiny_trainer(
                here,
                stage=stage,
                precision=precision,
                accumulation=accumulation,
                build=Faulty,
                training=TrainingConfig(epochs=2, log_every_steps=1, checkpoint_every_steps=2),
            )
            trainer.log.say = said.append
            ended = trainer.train()
            finite = all(bool(value.isfinite().all()) for value in weights(trainer).values())
            Faulty.bad = ()
            again = tiny_trainer(
                here, stage=stage, precision=precision, accumulation=accumulation, build=Faulty, training=trainer.config
            )
            resumed = again.resume()
            answers[f"{place} {name}"] = {
                "ended": ended,
                "finite": finite and all(bool(value.isfinite().all()) for value in weights(again).values()),
                "resumed": resumed,
                "skipped": trainer.progress.skipped,
                "said": [line for line in said if line.startswith("skipped")],
            }
    leave()
    return answers


@pytest.mark.parametrize(
    ("stage", "precision", "accumulation"),
    [
        (0, "fp32", 1),
        pytest.param(1, "fp32", 1, marks=pytest.mark.slow),
        (2, "fp32", 1),
        (3, "fp32", 1),
        pytest.param(0, "fp32", 2, marks=pytest.mark.slow),
        pytest.param(1, "bf16", 1, marks=pytest.mark.slow),
        pytest.param(2, "bf16", 2, marks=pytest.mark.slow),
        pytest.param(3, "bf16", 1, marks=pytest.mark.slow),
    ],
)
def test_what_is_not_finite_on_one_rank_reaches_nothing_and_is_named(
    stage, precision, accumulation, tmp_path, record_property
):
    record_property("tried", len(PLACES) * len(BAD))
    ranks = run_ranks(
        poisoned,
        world_size=2,
        timeout_seconds=400,
        folder=str(tmp_path),
        stage=stage,
        precision=precision,
        accumulation=accumulation,
    )
    for of_rank in ranks:
        for case, answer in of_rank.items():
            skipped = 2 if accumulation == 1 else 1  # the third and the fourth forward are of one step of two
            assert (answer["ended"], answer["finite"], answer["resumed"]) == ("finished", True, True), case
            assert answer["skipped"] == skipped, case
            assert len(answer["said"]) == skipped, case
            for line in answer["said"]:
                assert "rank 1 (host" in line, case
                assert "rank 0 (host" not in line, case
                assert "video0_2_0" in line or "video0_3_0" in line, case


def weights_go_wrong(folder: str, stage: int) -> dict:
    """A weight of rank 1 becomes infinite between two steps, in the optimizer's copy alone."""
    world = resolve_world(os.environ)
    trainer = tiny_trainer(folder, stage=stage, training=TrainingConfig(epochs=2, checkpoint_every_steps=3))
    trainer.train()
    if world.rank == 1:
        moment = next(
            value
            for state in trainer.engine.basic_optimizer.state.values()
            for value in state.values()
            if torch.is_tensor(value) and value.numel() > 1
        )
        moment.view(-1)[0] = torch.inf
    message = "saved"
    try:
        trainer.checkpoints.save(trainer.engine, trainer.average, trainer.progress)
    except FloatingPointError as error:
        message = str(error)
    leave()
    return {"message": message}


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_what_is_not_finite_is_never_saved(stage, tmp_path):
    for of_rank in run_ranks(weights_go_wrong, world_size=2, timeout_seconds=200, folder=str(tmp_path), stage=stage):
        assert "after step 8 not all numbers are finite: the optimizer's state on rank 1 (host" in of_rank["message"]
        assert "no checkpoint is written, earlier ones are intact" in of_rank["message"]


def padded_with_nan(folder: str) -> dict:
    """Training where all memory that nobody has written yet is NaN."""
    torch.use_deterministic_algorithms(True)  # it fills what torch.empty gives with NaN
    trainer = tiny_trainer(folder, stage=3, training=TrainingConfig(epochs=1, checkpoint_every_steps=2))
    ended = trainer.train()
    leave()
    return {"ended": ended, "shards": sum(int(shard.isnan().sum()) for shard in master_weights(trainer.engine))}


def test_padding_of_a_shard_passes_for_no_weight(tmp_path):
    for of_rank in run_ranks(padded_with_nan, world_size=2, timeout_seconds=200, folder=str(tmp_path)):
        assert of_rank == {"ended": "finished", "shards": 0}
