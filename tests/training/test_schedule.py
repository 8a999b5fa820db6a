"""The learning rate, step by step, worked by hand."""

from __future__ import annotations

import pytest

from re2tal.training.schedule import ScheduleConfig, learning_rate_factor, num_optimizer_steps


def factors(config: ScheduleConfig, *, num_steps: int, steps_per_epoch: float = 4) -> list[float]:
    factor = learning_rate_factor(config, steps_per_epoch=steps_per_epoch, num_steps=num_steps)
    return [factor(step) for step in range(num_steps + 1)]


def test_warmup_rises_to_the_peak_and_the_cosine_falls_to_the_end():
    found = factors(ScheduleConfig(warmup_epochs=0.5), num_steps=6)
    assert found == pytest.approx([0.5, 1.0, 1.0, 0.8535534, 0.5, 0.1464466, 0.0])


def test_the_cosine_ends_at_its_final_factor():
    assert factors(ScheduleConfig(warmup_epochs=0, final_factor=0.1), num_steps=2) == pytest.approx([1.0, 0.55, 0.1])


def test_a_constant_holds_the_peak():
    assert factors(ScheduleConfig(shape="constant", warmup_epochs=1), num_steps=6) == [0.25, 0.5, 0.75, 1, 1, 1, 1]


def test_a_warmup_longer_than_the_run_is_refused():
    with pytest.raises(ValueError, match=r"schedule.warmup_epochs = 2 is 8 steps, but the run has only 6; shorten"):
        factors(ScheduleConfig(warmup_epochs=2), num_steps=6)


def test_too_little_data_for_a_step_is_said():
    with pytest.raises(ValueError, match="1 epochs of 3 batches give no step with gradient accumulation 4; add videos"):
        num_optimizer_steps(1, 3, accumulation=4)
