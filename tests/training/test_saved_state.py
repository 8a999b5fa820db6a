"""Weights out of the shards of several ranks, by hand; whole checkpoints are compared in test_public_api.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from re2tal.training.saved_state import SavedState

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


def test_each_rank_has_a_part_of_each_weight(tmp_path: Path) -> None:
    names = {"model": "zero_pp_rank_0_mp_rank_00_model_states.pt", "key": "fp32_flat_groups"}
    whole = saved(tmp_path, [[1, 2, 4, 5], [3, 0, 6, 7]], **names).whole("weights")
    assert whole is not None
    assert {name: values.tolist() for name, values in whole.items()} == WHOLE
    with pytest.raises(ValueError, match=r"holds 2 of the 4 numbers of b \(weights\)"):
        saved(tmp_path, [[1, 2, 4], [3, 0, 6]], **names).whole("weights")


def test_ranks_go_by_their_numbers(tmp_path: Path) -> None:
    shards = [[float(rank)] for rank in range(11)]
    names = {"model": "zero_pp_rank_0_mp_rank_00_model_states.pt", "key": "fp32_flat_groups"}
    optimizers = saved(tmp_path, shards, **names).optimizers
    assert [one["fp32_flat_groups"][0].item() for one in optimizers] == list(range(11))
