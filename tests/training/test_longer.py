"""A run that goes on for longer, or with another schedule, than it began with."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from training.tiny import TinyDetector, same, tiny_trainer, weights

from re2tal.training.config import TrainingConfig
from re2tal.training.process_group import leave
from re2tal.training.schedule import PeakRates, ScheduleConfig
from re2tal.training.trainer import Trainer

NAMES = ("training.epochs", "schedule.shape", "optimizer.learning_rate")


@pytest.fixture(autouse=True)
def _left():
    yield
    leave()


def trainer(folder, *, epochs: int, shape: str = "constant", stage: int = 0, learning_rate: float = 1e-2) -> Trainer:
    return tiny_trainer(
        folder,
        stage=stage,
        training=TrainingConfig(epochs=epochs, log_every_steps=1),
        schedule=ScheduleConfig(shape=shape, warmup_epochs=0.5),
        learning_rate=learning_rate,
        values=dict(zip(NAMES, (epochs, shape, learning_rate), strict=True)),
        free=NAMES,
    )


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_two_epochs_and_two_more_are_four_to_the_bit_where_the_learning_rate_is_constant(stage, tmp_path, capsys):
    whole = trainer(tmp_path / "whole", epochs=4, stage=stage)
    whole.train()
    trainer(tmp_path / "parts", epochs=2, stage=stage).train()
    longer = trainer(tmp_path / "parts", epochs=4, stage=stage)
    capsys.readouterr()
    assert longer.resume()
    assert capsys.readouterr().err == "from here on training.epochs is 4, it was 2\n"
    assert (longer.train(), longer.progress.step) == ("finished", 16)
    assert same(weights(longer), weights(whole))


def test_the_learning_rate_follows_the_course_of_the_longer_run(tmp_path, capsys):
    trainer(tmp_path, epochs=2, shape="cosine").train()
    longer = trainer(tmp_path, epochs=4, shape="cosine")
    assert longer.resume()
    # The rise takes 2 of 16 steps, the cosine the other 14; the run of 8 steps had ended at 0.
    wanted = [1e-2 * 0.5 * (1 + math.cos(math.pi * (step - 2) / 14)) for step in range(8, 17)]
    assert f"the next step's learning rate is {wanted[0]:.3g}; as the run was before, 0" in capsys.readouterr().err
    longer.train()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["lr"] for row in rows if row["step"] > 8] == pytest.approx(wanted[1:], abs=1e-12)


class Overflowing(TinyDetector):
    """The gradients of its third and fourth forward are not finite."""

    def loss(self, outputs, actions, timelines, *, num_frames):
        self.forwards = getattr(self, "forwards", 0) + 1
        if self.forwards in (3, 4):
            outputs.values.register_hook(lambda gradient: gradient * torch.inf)
        return super().loss(outputs, actions, timelines, num_frames=num_frames)


@pytest.mark.parametrize("stage", [0, 2])
def test_the_learning_rate_is_that_of_the_step_after_steps_that_were_skipped_and_a_resume(stage, tmp_path):
    training = TrainingConfig(epochs=2, log_every_steps=1, checkpoint_every_steps=6, keep_checkpoints=3)
    whole = tiny_trainer(tmp_path, stage=stage, training=training, build=Overflowing)
    whole.train()
    assert (whole.progress.step, whole.progress.skipped) == (8, 2)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    wanted = [1e-2, *(1e-2 * 0.5 * (1 + math.cos(math.pi * (step - 2) / 6)) for step in range(2, 9))]
    assert [row["lr"] for row in rows] == pytest.approx(wanted, abs=1e-12)
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000008")
    again = tiny_trainer(tmp_path, stage=stage, training=training)
    assert again.resume()
    schedule = again.engine.lr_scheduler
    assert (again.progress.step, schedule.last_epoch) == (6, 6)
    assert again.engine.optimizer.param_groups[0]["lr"] == pytest.approx(wanted[5], abs=1e-12)
    # As a version wrote it that left the schedule behind.
    schedule.last_epoch = 4
    PeakRates.of(schedule).apply(schedule, step=again.progress.step)
    assert schedule.last_epoch == 6
    again.train()
    assert same(weights(again), weights(whole))


def test_another_shape_and_another_peak_count_from_the_next_step_on(tmp_path, capsys):
    trainer(tmp_path, epochs=2, shape="cosine").train()
    changed = trainer(tmp_path, epochs=3, shape="constant", learning_rate=4e-2)
    assert changed.resume()
    groups = changed.engine.optimizer.param_groups
    assert {group["name"].split(",")[0]: group["lr"] for group in groups} == {"backbone": 1e-2, "localizer": 4e-2}
    said = capsys.readouterr().err
    assert "from here on optimizer.learning_rate is 0.04, it was 0.01\n" in said
    assert "from here on schedule.shape is constant, it was cosine\n" in said
    changed.train()
    assert {group["lr"] for group in groups} == {1e-2, 4e-2}


def test_a_run_shorter_than_what_it_has_trained_is_refused(tmp_path):
    trainer(tmp_path, epochs=3).train()
    with pytest.raises(ValueError, match=r"training.epochs is 2, which is 8 steps, .* has taken 12; give 3 epochs or"):
        trainer(tmp_path, epochs=2).resume()
    assert trainer(tmp_path, epochs=3).resume()


def test_what_is_not_free_is_refused_as_before(tmp_path):
    trainer(tmp_path, epochs=2).train()
    with pytest.raises(ValueError, match=r"seed is 1, the checkpoint has 0"):
        tiny_trainer(tmp_path, training=TrainingConfig(epochs=2, seed=1)).resume()
