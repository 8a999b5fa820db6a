"""Weights out of the shards of several ranks, by hand; whole checkpoints are compared in test_public_api.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from training.tiny import TinyDetector, tiny_trainer, weights

from re2tal.distributed import World
from re2tal.training.saved_state import SavedState, refuse_scrambled

SHAPES = {"a": torch.Size([3]), "b": torch.Size([2, 2])}
WHOLE = {"a": [1.0, 2.0, 3.0], "b": [4.0, 5.0, 6.0, 7.0]}


def saved(folder: Path, shards: list[list[float]], *, model: str, key: str) -> SavedState:
    """A checkpoint whose ranks hold these float32 weights, under the names that DeepSpeed gives its files."""
    files: dict[str, dict[str, Any]] = {model: {"param_shapes": [SHAPES]}}
    for rank, shard in enumerate(shards):
        files[f"rank-{rank:05d}.pt"] = {"average": None}
        name = f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        files[name] = {"optimizer_state_dict": {key: [torch.tensor(shard)]}}
    for name in files:
        (folder / name).touch()
    return SavedState(folder, lambda path: files[path.name])


def test_flat_shards_follow_each_other_and_end_in_padding(tmp_path: Path) -> None:
    names = {"model": "mp_rank_00_model_states.pt", "key": "single_partition_of_fp32_groups"}
    whole = saved(tmp_path, [[1, 2, 3, 4], [5, 6, 7, 0]], **names).whole("weights")
    assert whole is not None
    assert {name: values.tolist() for name, values in whole.items()} == WHOLE
    with pytest.raises(ValueError, match=r"holds 3 of the 4 numbers of b \(weights\)"):
        saved(tmp_path, [[1, 2, 3], [4, 5, 6]], **names).whole("weights")


class OddDetector(TinyDetector):
    """With weights whose numbers are no multiple of four."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(48, 23), nn.LayerNorm(23))
        self.localizer = nn.Linear(23, 1)


@pytest.mark.parametrize("aligned", [True, False])
def test_weights_that_deepspeed_aligns_in_memory_are_found(
    aligned: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in World().variables():
        monkeypatch.delenv(name, raising=False)
    zero = {"stage": 2, "parameter_alignment": aligned}
    trainer = tiny_trainer(tmp_path, zero=zero, build=OddDetector)
    trainer.train()
    trained = weights(trainer)
    saved = SavedState(tmp_path / "checkpoints" / "step-00000008", lambda path: torch.load(path, weights_only=False))
    whole = saved.whole("weights")
    assert whole is not None
    assert all(torch.equal(whole[name], trained[name].flatten()) for name in whole)
    assert len(whole) == 6


def test_each_rank_has_a_part_of_each_weight(tmp_path: Path) -> None:
    names = {"model": "zero_pp_rank_0_mp_rank_00_model_states.pt", "key": "fp32_flat_groups"}
    whole = saved(tmp_path, [[1, 2, 4, 5], [3, 0, 6, 7]], **names).whole("weights")
    assert whole is not None
    assert {name: values.tolist() for name, values in whole.items()} == WHOLE
    with pytest.raises(ValueError, match=r"holds 2 of the 4 numbers of b \(weights\)"):
        saved(tmp_path, [[1, 2, 4], [3, 0, 6]], **names).whole("weights")


def test_shards_in_an_order_that_nobody_can_tell_are_refused(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"zero_optimization": {"stage": 2, "round_robin_gradients": True}}
    refuse_scrambled(tmp_path, settings, num_ranks=1)
    with pytest.raises(ValueError, match=r"round_robin_gradients, .* on 2 ranks .* begin a run anew"):
        refuse_scrambled(tmp_path, settings, num_ranks=2)
    settings["zero_optimization"]["round_robin_gradients"] = False
    refuse_scrambled(tmp_path, settings, num_ranks=2)


def test_ranks_go_by_their_numbers(tmp_path: Path) -> None:
    shards = [[float(rank)] for rank in range(11)]
    names = {"model": "zero_pp_rank_0_mp_rank_00_model_states.pt", "key": "fp32_flat_groups"}
    optimizers = saved(tmp_path, shards, **names).optimizers
    assert [one["fp32_flat_groups"][0].item() for one in optimizers] == list(range(11))
