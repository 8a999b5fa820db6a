"""Weights out of the shards of several ranks, by hand; whole checkpoints are compared in test_public_api.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from re2tal.runs.checkpoint_weights import _of_flat, _of_parts

HERE = Path("step-00000001")
SHAPES = {"a": torch.Size([3]), "b": torch.Size([2, 2])}
A, B = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([[4.0, 5.0], [6.0, 7.0]])


def test_flat_shards_follow_each_other_and_end_in_padding() -> None:
    weights = _of_flat(HERE, torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 0]), SHAPES)
    assert torch.equal(weights["a"], A)
    assert torch.equal(weights["b"], B)
    with pytest.raises(ValueError, match="step-00000001 has 6 numbers for 7 of the weights"):
        _of_flat(HERE, torch.zeros(6), SHAPES)


def test_each_rank_has_a_part_of_each_weight() -> None:
    ranks = [torch.tensor([1.0, 2, 4, 5]), torch.tensor([3.0, 0, 6, 7])]
    weights = _of_parts(HERE, ranks, SHAPES)
    assert torch.equal(weights["a"], A)
    assert torch.equal(weights["b"], B)
    with pytest.raises(ValueError, match="step-00000001 has 3 numbers a rank for 4 of the weights"):
        _of_parts(HERE, [torch.zeros(3), torch.zeros(3)], SHAPES)
