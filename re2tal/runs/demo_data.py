"""The demo data set: written on request, or where the demo recipes would look for their shards in vain."""

from __future__ import annotations

import sys
from pathlib import Path

from re2tal.config import AnyRun, RunConfig
from re2tal.data.building.demo import DemoConfig, write_demo, write_demo_clips
from re2tal.data.contract.manifest import MANIFEST_NAME
from re2tal.distributed import World, main_process_first
from re2tal.recipes import find_recipe
from re2tal.runs.lock import locked
from re2tal.runs.shard_building import Build, build

NUM_CLIPS = (480, 60)
"""Trimmed clips in the two subsets."""


def write_videos(
    out: Path,
    *,
    seed: int = DemoConfig.seed,
    num_training: int | None = None,
    num_validation: int | None = None,
    workers: int | None = None,
    clips: bool = False,
) -> None:
    """Write the videos, or trimmed clips of them, to `out`, and print what is there."""
    training, validation = NUM_CLIPS if clips else (DemoConfig.num_training, DemoConfig.num_validation)
    config = DemoConfig(
        num_training=training if num_training is None else num_training,
        num_validation=validation if num_validation is None else num_validation,
        seed=seed,
    )
    # Two that draw at once would write into each other's files.
    with locked(out):
        place = (write_demo_clips if clips else write_demo)(out, config, workers=workers)
    kind = "clips" if clips else "videos"
    print(f"{config.num_training} training and {config.num_validation} validation {kind} in {out / kind}, {place}")


def make_if_wanted(run: AnyRun, world: World) -> None:
    """Every rank calls this: where the demo recipe would look for its shards in vain, rank 0 makes them first."""
    shards = run.data.shards
    subsets = (run.data.training_subset, run.data.validation_subset)
    with main_process_first():
        # The manifest is written last, so it tells of the whole folder.
        is_complete = all((shards / subset / MANIFEST_NAME).is_file() for subset in subsets)
        recipe = "demo" if isinstance(run, RunConfig) else "demo_clips"
        if world.is_main and shards == find_recipe(recipe).data.shards and not is_complete:
            print(f"{shards} is not complete: making the demo videos and their shards first", file=sys.stderr)
            _make(shards, clips=recipe == "demo_clips")


def _make(shards: Path, *, clips: bool) -> None:
    folder = shards.parent
    write_videos(folder, clips=clips)
    if clips:
        build(Build(out=shards, dataset="demo", clips=(folder / "clips",)))
    else:
        annotations = folder / "annotations.json"
        build(Build(out=shards, dataset="demo", videos=folder / "videos", annotations=annotations))
