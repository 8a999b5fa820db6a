"""Small feature folders, written by the program's own builder from tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from re2tal.data.building.build_features import Computed, FeatureBuild, FeatureShard
from re2tal.data.contract.feature_manifest import FeatureGrid, FeatureSpec, Packed, SecondsPerStep, StoredType
from re2tal.data.contract.shards import FeatureSet, open_any
from re2tal.structures import Action, VideoRecord

STEP = 0.25


def spec(channels: int, *, grid: FeatureGrid | None = None, dtype: StoredType = "float32") -> FeatureSpec:
    return FeatureSpec(channels, dtype, grid or SecondsPerStep(STEP), Packed(16, 30.0, "0" * 64))


def record(video_id: str, seconds: float, *actions: Action) -> VideoRecord:
    return VideoRecord(video_id, "training", seconds, actions)


def write_features(
    root: Path,
    values: Mapping[str, Tensor],
    *,
    actions: Sequence[Action] = (),
    seconds_per_step: float = STEP,
    start_seconds: float = 0.0,
    per_shard: int = 2,
    dtype: StoredType = "float32",
    classes: tuple[str, ...] = ("x",),
) -> FeatureSet:
    """A folder of `values`, video id -> (C, T)."""
    records = [
        record(name, start_seconds + of_video.shape[1] * seconds_per_step, *actions)
        for name, of_video in values.items()
    ]
    shards = [
        FeatureShard(f"shard-{number:06d}.tar", tuple(records[first : first + per_shard]))
        for number, first in enumerate(range(0, len(records), per_shard))
    ]
    channels = next(iter(values.values())).shape[0]
    build = FeatureBuild(root, "own", "training", classes, spec(channels, dtype=dtype))
    build.run(
        shards,
        lambda asked: (Computed(values[one.video_id], seconds_per_step, start_seconds) for one in asked),
    )
    opened = open_any(root)
    assert isinstance(opened, FeatureSet)
    return opened
