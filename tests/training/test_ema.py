"""The moving average where a trainer is not needed: what it refuses, and what a checkpoint gives back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from re2tal.training import ema
from re2tal.training.ema import WeightAverage, about_short_run
from re2tal.training.interruption import Interrupted


@pytest.fixture
def weights(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The master weights of an engine that is nothing else."""
    shards = [torch.tensor([1.0, 2.0]), torch.tensor([4.0])]
    monkeypatch.setattr(ema, "master_weights", lambda engine: shards)
    return shards


def test_a_checkpoint_gives_back_the_average_and_not_the_weights(weights: list[Tensor]) -> None:
    average = WeightAverage(None, decay=0.75)
    weights[0].copy_(torch.tensor([5.0, 6.0]))
    average.update()
    saved = [shard.clone() for shard in average.state()]
    assert [shard.tolist() for shard in saved] == [[2.0, 3.0], [4.0]]
    restored = WeightAverage(None, decay=0.75)
    restored.restore(saved)
    assert [shard.tolist() for shard in restored.state()] == [[2.0, 3.0], [4.0]]
    assert weights[0].tolist() == [5.0, 6.0]
    weights[0].copy_(torch.tensor([2.0, 7.0]))
    restored.update()
    assert [shard.tolist() for shard in restored.state()] == [[2.0, 4.0], [4.0]]
    assert saved[0].tolist() == [2.0, 3.0]


@pytest.mark.parametrize(("error", "collectives"), [(Interrupted, 2), (ValueError, 1)])
def test_an_error_of_one_rank_does_not_wait_for_the_others(
    weights: list[Tensor], monkeypatch: pytest.MonkeyPatch, error: type[Exception], collectives: int
) -> None:
    """It would be told of after the others' time limit, or never; all ranks are interrupted together."""
    calls: list[None] = []
    monkeypatch.setattr(ema, "publish", calls.append)
    average = WeightAverage(None, decay=0.9)
    with pytest.raises(error), average.in_place_of_weights():
        raise error
    assert len(calls) == collectives


def test_the_average_of_other_shards_is_refused(weights: list[Tensor]) -> None:
    with pytest.raises(ValueError, match=r"weight average has shards \[.*3.*\], this run .*; resume with"):
        WeightAverage(None, decay=0.9).restore([torch.zeros(3)])


def test_a_run_too_short_for_its_average_says_what_it_would_export(weights: list[Tensor]) -> None:
    said = about_short_run(0.9, num_steps=20)
    assert said is not None
    assert "after 20 steps 12% of the averaged weights" in said
    assert "with 0.794 it would be 1%" in said
    average = WeightAverage(None, decay=0.9)
    for shard in weights:
        shard.zero_()
    for _ in range(20):
        average.update()
    assert average.shards[1].item() == pytest.approx(4 * 0.12158, rel=1e-4)
    assert about_short_run(0.9, num_steps=22) is None
    assert about_short_run(None, num_steps=1) is None
