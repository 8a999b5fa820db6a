"""When a run is told that its checkpoints take too long, and how far apart they would do."""

from __future__ import annotations

import pytest

from re2tal.training.stall import Stall


def advice_after(saves: int, *, steps_apart: int, step_seconds: float, save_seconds: float) -> list[str | None]:
    stall, now, said = Stall(), 0.0, []
    for number in range(1, saves + 1):
        now += steps_apart * step_seconds
        said.append(stall.add(number * steps_apart, started=now, ended=now + save_seconds))
        now += save_seconds
    return said


def test_advice_comes_once_and_following_it_ends_it():
    said = advice_after(6, steps_apart=10, step_seconds=0.5, save_seconds=1.0)
    assert said[:3] == [*said[4:], None] == [None] * 3
    # 1 s of every 6; to be 1 of 50, 49 s of training must lie between two, which are 98 steps.
    assert said[3] is not None
    assert "checkpoints take 17% of the time, 1 s each" in said[3]
    assert "--training.checkpoint-every-steps 98 they would take 2%" in said[3]
    assert not any(advice_after(6, steps_apart=98, step_seconds=0.5, save_seconds=1.0))
    assert any(advice_after(6, steps_apart=90, step_seconds=0.5, save_seconds=1.0))


@pytest.mark.parametrize("steps_apart", [0, 1])
def test_saves_that_follow_each_other_at_once_divide_by_nothing(steps_apart):
    assert len(advice_after(6, steps_apart=steps_apart, step_seconds=0.0, save_seconds=0.0)) == 6
