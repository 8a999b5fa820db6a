"""What a network looks at: its shards, or a folder of them, as batches."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from re2tal.backbones.stored import NAME
from re2tal.config import AnyRun, DataConfig, RunConfig
from re2tal.data.contract.shards import FeatureSet, ShardSet, open_any, subset_folder
from re2tal.data.streaming.stream import stream_clips
from re2tal.distributed import World
from re2tal.options import COUNT, check
from re2tal.progress import counted
from re2tal.runs.stored_features import check_kind
from re2tal.structures import Batch


def check_looks_at_videos(run: Path, config: RunConfig, *, asked: str) -> None:
    """ValueError where the detector of `run` takes stored features, and `asked` names videos."""
    if config.backbone.name == NAME:
        raise ValueError(
            f"{asked} was asked for, but {run} was trained on stored features and has no network that looks at videos; "
            "pack these videos (re2tal shards build), extract their features as those of its training were (re2tal "
            "features extract), and detect in that folder (shards)"
        )


def batch_of(asked: int | None, config: AnyRun) -> int:
    """Clips in one forward: as asked for, or as in training."""
    check("batch_size", asked, COUNT)
    return asked or config.engine.batch_size


def batches_with_bar(
    shards: ShardSet | FeatureSet, data: DataConfig, *, batch_size: int, world: World | None = None
) -> Iterable[Batch]:
    """This rank's clips of `shards`, once, with their progress."""
    world = world or World()
    stream = stream_clips(
        shards,
        data.clips,
        batch_size=batch_size,
        training=False,
        rank=world.rank,
        world_size=world.world_size,
        decoder=data.decoder,
    )
    return counted(stream.epoch(0), total=stream.steps_per_epoch, about=shards.subset, shown=world.is_main)


def open_source(config: AnyRun, *, videos: Path | None, shards: Path | None) -> ShardSet | FeatureSet | None:
    """The shards to look at, the validation subset by default; None where a folder of video files was given instead.

    ValueError where both were given, or where the network cannot take what the shards hold.
    """
    if videos is not None and shards is not None:
        raise ValueError(f"videos {videos} and shards {shards} were both given; give one of them")
    if videos is not None:
        return None
    opened = open_any(shards or subset_folder(config.data.shards, config.data.validation_subset))
    check_kind(config, opened)
    return opened
