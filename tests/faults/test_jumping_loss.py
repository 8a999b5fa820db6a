"""A loss that jumps is named with its rank, step and videos, and costs nothing else."""

from __future__ import annotations

import os

import pytest
import torch
from distributed.ranks import run_ranks
from training.tiny import TinyDetector, tiny_trainer, weights

from re2tal.distributed import resolve_world
from re2tal.training.config import TrainingConfig
from re2tal.training.jumps import FACTOR, LEAST, LossWatch
from re2tal.training.process_group import leave


class Jumping(TinyDetector):
    """In some forwards the loss is 10,000 times as large on one rank."""

    jumps: tuple = ()
    """(forward, rank)"""

    def loss(self, outputs, actions, timelines, *, num_frames):
        self.forwards = getattr(self, "forwards", 0) + 1
        losses = super().loss(outputs, actions, timelines, num_frames=num_frames)
        jumped = (self.forwards, resolve_world(os.environ).rank) in self.jumps
        return {name: loss * 1e4 for name, loss in losses.items()} if jumped else losses


def jumped(folder: str, jumps: list) -> dict:
    """What the log says of a run with and without them."""
    said: dict[str, list[str]] = {}
    for kind, of_run in (("clean", []), ("jumping", jumps)):
        Jumping.jumps = tuple(map(tuple, of_run))
        training = TrainingConfig(epochs=6, log_every_steps=4)
        trainer = tiny_trainer(f"{folder}/{kind}", stage=2, build=Jumping, training=training, learning_rate=1e-4)
        lines: list[str] = []
        trainer.log.say = lines.append
        ended = trainer.train()
        said[kind] = [line for line in lines if "jumped" in line]
        finite = all(bool(value.isfinite().all()) for value in weights(trainer).values())
    leave()
    return {**said, "ended": ended, "finite": finite}


def test_a_loss_that_jumps_on_one_rank_is_named_on_all(tmp_path, record_property):
    jumps = [(12, 1), (14, 0), (19, 1), (20, 1), (24, 0)]
    record_property("tried", len(jumps))
    for of_rank in run_ranks(jumped, world_size=2, timeout_seconds=200, folder=str(tmp_path), jumps=jumps):
        assert (of_rank["clean"], of_rank["ended"], of_rank["finite"]) == ([], "finished", True)
        assert len(of_rank["jumping"]) == len(jumps), of_rank["jumping"]
        for forward, rank in jumps:
            epoch, step = divmod(forward - 1, 4)
            [line] = [line for line in of_rank["jumping"] if f" in step {forward - 1}: " in line]
            assert f"the loss jumped on rank {rank} (host " in line
            assert f"['video{epoch}_{step}_0', 'video{epoch}_{step}_1']" in line


@pytest.mark.parametrize("largest", [0.9, 1.1])
def test_the_limit_is_a_multiple_of_the_mean_of_what_came_before(largest):
    watch = LossWatch()
    for step in range(LEAST):
        watch.add(step, torch.tensor(2.0 + step % 2), ("usual",))
    watch.add(LEAST, torch.tensor(2.5 * FACTOR * largest), ("large", "other"))
    found = watch.found()
    assert found == ([] if largest < 1 else ["step 10: 27.5, 11 times the mean, from ['large', 'other']"])
    assert watch.found() == []


def test_a_loss_that_is_not_finite_does_not_hide_the_next_jump():
    watch = LossWatch()
    for step in range(2 * LEAST):
        watch.add(step, torch.tensor({3: torch.inf}.get(step, torch.nan if step % 3 == 1 else 1.0)), ("usual",))
    watch.add(20, torch.tensor(100.0), ("large",))
    assert watch.found() == ["step 20: 100, 100 times the mean, from ['large']"]
