"""The loop in one process: accumulation, evaluation on the way, blank clips, divergence."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import pytest
import torch
from training.tiny import TinyClips, same, tiny_trainer, weights

from re2tal.training.config import TrainingConfig
from re2tal.training.skips import LOSS_SCALE_SEARCH


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


def rows(folder, kind):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in lines if row["kind"] == kind]


def test_the_loss_falls_and_is_logged_with_rates_and_speed(tmp_path):
    assert tiny_trainer(tmp_path, training=TrainingConfig(epochs=2, log_every_steps=1)).train() == "finished"
    train = rows(tmp_path, "train")
    assert [row["step"] for row in train] == list(range(1, 9))
    assert train[-1]["loss"] < 0.5 * train[0]["loss"]
    assert {"epoch", "loss", "loss/error", "clips_per_second", "peak_memory_gib", "skipped"} <= train[0].keys()
    assert train[0]["lr/backbone, decayed"] == pytest.approx(1e-2)


def test_what_deepspeed_refuses_in_its_file_is_an_error_that_says_so(tmp_path):
    with pytest.raises(ValueError, match=r"DeepSpeed refuses .* pre-scale gradients is not yet .*; correct the file"):
        tiny_trainer(tmp_path, stage=2, settings={"prescale_gradients": True})


def test_the_time_spent_waiting_for_the_loader_is_logged_as_a_share_of_the_step(tmp_path):
    training = TrainingConfig(epochs=1, log_every_steps=2)
    trainer = tiny_trainer(tmp_path, training=training, on_batch=lambda epoch, step: time.sleep(0.1))
    trainer.train()
    for row in rows(tmp_path, "train"):
        assert 0 < row["loader_wait"] < 1
        seconds_per_step = 2 / row["clips_per_second"]
        assert 0.1 <= row["loader_wait"] * seconds_per_step * (1 + 1e-6) < seconds_per_step


def test_accumulation_makes_one_step_of_several_batches(tmp_path):
    trainer = tiny_trainer(tmp_path, accumulation=2, training=TrainingConfig(epochs=2, log_every_steps=1))
    trainer.train()
    assert (trainer.progress.step, trainer.progress.micro_batches) == (4, 8)
    assert [row["epoch"] for row in rows(tmp_path, "train")] == [0.5, 1.0, 1.5, 2.0]


def test_evaluation_uses_the_average_and_leaves_the_weights_as_they_were(tmp_path):
    seen = []

    def validate(engine):
        seen.append({name: value.clone() for name, value in engine.module.state_dict().items()})
        return {"average_map": 0.25}

    training = TrainingConfig(epochs=3, evaluate_every_epochs=1, average_decay=0.5)
    trainer = tiny_trainer(tmp_path / "with", stage=2, training=training, validate=validate)
    trainer.train()
    undisturbed = tiny_trainer(tmp_path / "without", stage=2, training=replace(training, evaluate_every_epochs=None))
    undisturbed.train()
    assert same(weights(trainer), weights(undisturbed))
    # After epochs 1 and 2; the one at the end belongs to whoever finishes the run.
    assert [(row["step"], row["average_map"]) for row in rows(tmp_path / "with", "evaluation")] == [
        (4, 0.25),
        (8, 0.25),
    ]
    with trainer.averaged_weights():
        average = weights(trainer)
    assert not same(average, weights(trainer))
    assert not same(seen[1], average)


def test_the_average_is_the_exponential_mean_of_the_weights(tmp_path):
    trainer = tiny_trainer(tmp_path, training=TrainingConfig(epochs=2, average_decay=0.75))
    expected = {name: value.double() for name, value in weights(trainer).items()}
    update = trainer.average.update

    def follow() -> None:
        update()
        for name, value in weights(trainer).items():
            expected[name] = 0.75 * expected[name] + 0.25 * value.double()

    trainer.average.update = follow
    trainer.train()
    with trainer.averaged_weights():
        for name, parameter in trainer.engine.module.named_parameters():
            torch.testing.assert_close(parameter.double(), expected[name], rtol=0, atol=1e-6)


def test_clips_that_could_not_be_decoded_teach_nothing(tmp_path):
    trainer = tiny_trainer(tmp_path)
    trainer.engine.eval()
    batch = TinyClips().batch(0, 0)
    whole = trainer._forward(batch).losses["error"]
    first = trainer._forward(replace(batch, valid=torch.tensor([True, False]))).losses["error"]
    second = trainer._forward(replace(batch, valid=torch.tensor([False, True]))).losses["error"]
    none = trainer._forward(replace(batch, valid=torch.tensor([False, False]))).total
    torch.testing.assert_close(first + second, whole)
    assert none.item() == 0.0
    trainer.engine.backward(none)
    assert all(not parameter.grad.any() for parameter in trainer.engine.module.parameters())


def test_a_run_that_diverged_ends_with_the_clips_it_saw(tmp_path):
    poison = [(epoch, step, 0) for epoch in range(3) for step in range(4)]
    trainer = tiny_trainer(tmp_path, training=TrainingConfig(epochs=2, max_non_finite=3), poison=poison[1:])
    with pytest.raises(FloatingPointError, match=r"3 batches .* not finite, .*'video0_3_0', 'video0_3_1'.*lower the"):
        trainer.train()
    assert trainer.progress.step == 1


def test_steps_that_the_engine_never_applies_are_counted_and_end_the_run(tmp_path, monkeypatch):
    trainer = tiny_trainer(tmp_path, training=TrainingConfig(epochs=2, max_non_finite=3))
    monkeypatch.setattr(trainer.engine, "was_step_applied", lambda: False)
    with pytest.raises(FloatingPointError, match="3 batches or steps in a row were not finite"):
        trainer.train()
    assert trainer.progress.skipped == 3


def test_fp16_may_skip_more_steps_while_its_loss_scale_is_sought_but_each_is_counted(tmp_path, monkeypatch):
    trainer = tiny_trainer(tmp_path, training=TrainingConfig(epochs=20, max_non_finite=3))
    monkeypatch.setattr(trainer.engine, "was_step_applied", lambda: False)
    monkeypatch.setattr(trainer.engine, "fp16_enabled", lambda: True)
    monkeypatch.setattr(trainer.engine.optimizer, "loss_scale", 1.0, raising=False)
    with pytest.raises(FloatingPointError, match=f"{LOSS_SCALE_SEARCH + 3} batches or steps in a row"):
        trainer.train()
    assert trainer.progress.skipped == LOSS_SCALE_SEARCH + 3


def test_a_search_for_a_loss_scale_is_not_counted_with_losses_that_are_not_finite(tmp_path, monkeypatch):
    """Ten skipped steps, one poisoned batch, then all is well: the run must end by itself."""
    poison = [(2, 2, 0)]
    trainer = tiny_trainer(tmp_path, training=TrainingConfig(epochs=5, max_non_finite=3), poison=poison)
    applied, steps = trainer.engine.was_step_applied, iter(range(1000))
    monkeypatch.setattr(trainer.engine, "was_step_applied", lambda: next(steps) >= 10 and applied())
    monkeypatch.setattr(trainer.engine, "fp16_enabled", lambda: True)
    monkeypatch.setattr(trainer.engine.optimizer, "loss_scale", 1.0, raising=False)
    assert trainer.train() == "finished"
    assert trainer.progress.skipped == 11
