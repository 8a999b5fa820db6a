"""Build feature folders from features of any origin: tars, index and manifest as for videos.

    plans -> missing shards -> features of their videos, in order -> tar and report of each -> manifest

A stopped build goes on with the missing shards. A video without usable features is left out, and the manifest says why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from re2tal.data.building.shard_folder import BuiltSubset, FeatureFolder, PackedVideo, ShardPlan, fingerprint
from re2tal.data.contract.feature_manifest import (
    FeatureManifest,
    FeatureSpec,
    FeatureTotals,
    IndexedFeatures,
    SourceFile,
    StoredFeatures,
)
from re2tal.data.contract.features import pack_features
from re2tal.data.contract.manifest import Rejection, to_json
from re2tal.structures import VideoRecord


@dataclass(frozen=True, slots=True)
class FeatureShard:
    """The videos of one shard, and the other inputs that determine its bytes."""

    name: str
    records: tuple[VideoRecord, ...]
    sources: tuple[str, ...] = ()
    """Identifies the state of the source files."""


@dataclass(frozen=True, slots=True)
class Computed:
    """The features of one video."""

    values: Tensor
    """(C, T) float"""
    seconds_per_step: float
    start_seconds: float = 0.0
    source: SourceFile | None = None


Compute = Callable[[Sequence[VideoRecord]], Iterator[Computed | str]]
"""Yields the features of each of these videos in order; a string (the reason) where a video has none."""


@dataclass(frozen=True, slots=True)
class FeatureBuild:
    """What is written: everything but the part decides the bytes."""

    folder: Path
    dataset: str
    subset: str
    classes: tuple[str, ...]
    spec: FeatureSpec
    part_index: int = 0
    """This run makes the shards whose number is `part_index` modulo `num_parts`."""
    num_parts: int = 1

    def run(self, shards: Sequence[FeatureShard], compute: Compute) -> BuiltSubset:
        """Write the missing shards of this part; the run that completes the folder writes the manifest.

        Raises ValueError where the folder holds features of other settings, and where no video can be used.
        """
        written = FeatureFolder(
            self.folder,
            settings={"dataset": self.dataset, "classes": self.classes, "features": self.spec},
            describe=self._describe,
        )

        def write_shards(plans: Sequence[ShardPlan]) -> None:
            results = compute([record for plan in plans for record in plan.records])
            for plan in plans:
                written.write(plan, (self._packed(record, next(results)) for record in plan.records))

        plans = [ShardPlan(shard.name, shard.records, self._fingerprint(shard)) for shard in shards]
        return written.build(plans, write_shards, part_index=self.part_index, num_parts=self.num_parts)

    def _fingerprint(self, shard: FeatureShard) -> str:
        # The records are part of it: unlike videos, features have their times from the annotated durations.
        version = str(FeatureManifest.VERSION)
        return fingerprint(version, to_json(self.spec), *map(to_json, shard.records), *shard.sources)

    def _packed(self, record: VideoRecord, computed: Computed | str) -> PackedVideo | Rejection:
        if isinstance(computed, str):
            return Rejection(record.video_id, computed)
        channels, num_steps = computed.values.shape
        if channels != self.spec.channels or num_steps == 0:
            reason = f"has {channels} channels and {num_steps} steps; wanted {self.spec.channels} channels"
            return Rejection(record.video_id, reason)
        try:
            content = pack_features(computed.values, dtype=self.spec.dtype)
        except ValueError as error:
            return Rejection(record.video_id, str(error))
        description = StoredFeatures(
            record=record,
            num_steps=num_steps,
            seconds_per_step=computed.seconds_per_step,
            start_seconds=computed.start_seconds,
            source=computed.source,
        )
        return PackedVideo(description, content)

    def _describe(self, videos: Sequence[IndexedFeatures], num_bytes: int) -> dict[str, Any]:
        steps = sum(video.num_steps for video in videos)
        return {"subset": self.subset, "totals": FeatureTotals(videos=len(videos), steps=steps, num_bytes=num_bytes)}
