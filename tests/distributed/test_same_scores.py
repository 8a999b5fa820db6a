"""Evaluation on any number of ranks finds and scores the same to the last digit, with shares that are not equal too."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from data.feature_folders import write_features
from distributed.ranks import run_ranks
from faults.test_told_to_stop import small_run

from re2tal.data.contract.shards import open_any, subset_folder
from re2tal.data.streaming.windows import Slide
from re2tal.distributed import resolve_world
from re2tal.runs.deepspeed_presets import find_preset
from re2tal.runs.stored_features import on_features
from re2tal.runs.tasks import build_model, judge
from re2tal.runs.training_data import stream_of
from re2tal.structures import Action
from re2tal.training.engine import build_engine
from re2tal.training.optimizer import build_optimizer
from re2tal.training.process_group import join, leave
from re2tal.training.zero_file import resolve_deepspeed_config

BATCH_SIZES = (1, 2)


def evaluated(features: str, folder: str, ds: str) -> dict:
    """This rank's share of the clips; rank 0 writes what was found; figures, and how many clips each rank had."""
    run, world = small_run(features), resolve_world(os.environ)
    join(world, run.engine)
    shards = open_any(subset_folder(Path(features), "validation"))
    found: dict[str, dict] = {}
    for size in BATCH_SIZES:
        config = replace(run, engine=replace(run.engine, batch_size=size))
        clips = replace(config.data.clips, windowing=Slide(num_frames=64, frames_per_second=8.0, overlap=0.25))
        config = on_features(replace(config, data=replace(config.data, clips=clips)), shards)
        torch.manual_seed(0)
        model = build_model(config, shards.classes)
        settings = resolve_deepspeed_config(find_preset(ds), config.engine, world_size=world.world_size)
        optimizer = build_optimizer(model, config.optimizer)
        engine = build_engine(model, optimizer, factor=lambda step: 1.0, settings=settings)
        batches = list(stream_of(config, shards, world, training=False).epoch(0))
        outcome = judge(engine, config=config, shards=shards, batches=batches)
        if world.is_main:
            outcome.write(Path(folder) / f"{size}.json")
        found[str(size)] = {
            "figures": outcome.figures,
            "clips": sum(int(batch.valid.sum()) for batch in batches),
            "summary": {name: value for name, value in outcome.summary.items() if isinstance(value, float | int)},
        }
    leave()
    return found


@pytest.fixture(scope="module")
def features(tmp_path_factory) -> Path:
    """Seven videos, which windows of 32 steps see as eleven clips."""
    folder = tmp_path_factory.mktemp("features")
    generator = torch.Generator().manual_seed(0)
    values = {f"video{n}": torch.randn(12, n, generator=generator) for n in (9, 17, 20, 25, 33, 41, 57)}
    actions = [Action(0.5, 1.5, "jump"), Action(0.75, 2.0, "run")]
    write_features(folder / "validation", values, actions=actions, classes=("jump", "run"))
    return folder


def test_any_number_of_ranks_finds_and_scores_the_same(features, tmp_path):
    files, figures, shares = {}, {}, {}
    for ranks, ds in ((1, "zero1"), (2, "zero2"), (3, "zero3")):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        of_ranks = run_ranks(
            evaluated, world_size=ranks, timeout_seconds=200, features=str(features), folder=str(folder), ds=ds
        )
        for size in map(str, BATCH_SIZES):
            files[ranks, size] = (folder / f"{size}.json").read_bytes()
            assert all(one[size]["figures"] == of_ranks[0][size]["figures"] for one in of_ranks)
            figures[ranks, size] = of_ranks[0][size]["figures"], of_ranks[0][size]["summary"]
            shares[ranks, size] = [one[size]["clips"] for one in of_ranks]
    assert figures[1, "1"][0]["average_map"] > 0
    for size in map(str, BATCH_SIZES):
        [whole] = shares[1, size]
        for ranks in (2, 3):
            assert files[ranks, size] == files[1, size]
            assert figures[ranks, size] == figures[1, size]
            assert sum(shares[ranks, size]) == whole
        assert whole == 11
        assert len(set(shares[3, size])) > 1  # not equal
