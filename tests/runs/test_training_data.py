"""What is said of subsets that a run is trained on and judged by."""

from __future__ import annotations

from pathlib import Path

import pytest
from data.folders import indexed, write_shards
from data.numbered import encode_numbered

from re2tal.data.contract.columns import shared_ids
from re2tal.data.contract.shards import ShardSet
from re2tal.runs.training_data import _say_renamed, _say_shared


def folder(root: Path, *video_ids: str) -> ShardSet:
    videos = {name: (encode_numbered(30), indexed(30, video_id=name)) for name in video_ids}
    return write_shards(root, videos, per_shard=2)


def test_videos_that_are_in_both_subsets_are_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    training, validation = folder(tmp_path / "t", "a", "b", "c"), folder(tmp_path / "v", "d", "b")
    _say_shared(training, validation)
    assert f"1 of 2 videos of {validation.root} are in {training.root} too, such as 'b'" in capsys.readouterr().err
    assert shared_ids(tuple(validation.videos), training.videos) == ["b"]  # entries without columns
    _say_shared(training, training)  # meant so
    _say_shared(training, folder(tmp_path / "w", "e"))
    assert capsys.readouterr().err == ""


def test_a_folder_with_the_name_of_another_subset_is_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    shards = folder(tmp_path / "validation", "a")
    _say_renamed("train", shards)
    assert capsys.readouterr().err == ""
    _say_renamed("validation", shards)
    assert "is used as subset 'validation', and its manifest says that it holds 'training'" in capsys.readouterr().err
