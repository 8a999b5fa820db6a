"""Build feature folders: features in, whoever makes them, then tars, index and manifest as for videos.

    plans of shards -> those still to be made -> features of their videos, in order -> tar, report -> ... -> manifest

A stopped build goes on with the missing shards. A video without usable features is left out, and the manifest says why.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from re2tal.data.building.build import REPORTS, BuiltSubset, finished, remove_leftovers
from re2tal.data.building.shard_builder import shard_file
from re2tal.data.contract.feature_manifest import (
    FORMAT,
    VERSION,
    FeatureManifest,
    FeatureReport,
    FeatureSpec,
    FeatureTotals,
    IndexedFeatures,
    SourceFile,
    StoredFeatures,
    read_feature_manifest,
)
from re2tal.data.contract.features import SUFFIX, pack_features
from re2tal.data.contract.manifest import INDEX_NAME, MANIFEST_NAME, Rejection, to_json
from re2tal.data.contract.shards import Pair, write_tar
from re2tal.strict_json import write_atomically
from re2tal.structures import VideoRecord


@dataclass(frozen=True, slots=True)
class FeatureShard:
    """The videos that go into one shard, and what else decides its bytes."""

    name: str
    records: tuple[VideoRecord, ...]
    sources: tuple[str, ...] = ()
    """Whatever tells one state of the sources from another, such as their sizes."""


@dataclass(frozen=True, slots=True)
class Computed:
    """The features of one video."""

    values: Tensor
    """(C, T) float"""
    seconds_per_step: float
    start_seconds: float = 0.0
    source: SourceFile | None = None


Compute = Callable[[Sequence[VideoRecord]], Iterator[Computed | str]]
"""Features of each of these videos, in order and when asked for; words where a video has none."""


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
        """Make the shards of this part that are missing; the run that finds all of them there writes the manifest.

        Raises ValueError where the folder holds features of other settings, and where no video can be used.
        """
        (self.folder / REPORTS).mkdir(parents=True, exist_ok=True)
        self._refuse_other_settings()
        todo = [shard for shard in shards[self.part_index :: self.num_parts] if self._finished(shard) is None]
        if todo:
            (self.folder / MANIFEST_NAME).unlink(missing_ok=True)  # what it says no longer holds
            results = compute([record for shard in todo for record in shard.records])
            for shard in todo:
                report = self._write(shard, results)
                write_atomically(self.folder / REPORTS / f"{shard.name}.json", to_json(report))
        reports = [self._finished(shard) for shard in shards]
        done = [report for report in reports if report is not None]
        if len(done) == len(shards):
            self._finish(done)
            remove_leftovers(self.folder, {shard.name for shard in shards})
        return BuiltSubset(
            folder=self.folder,
            num_videos=sum(len(shard.records) for shard in shards),
            num_shards=len(shards),
            num_missing_shards=len(shards) - len(done),
            rejected=tuple(rejection for report in done for rejection in report.rejected),
        )

    def _refuse_other_settings(self) -> None:
        path = self.folder / MANIFEST_NAME
        if not path.is_file():
            return
        manifest = read_feature_manifest(path)
        for name, theirs, ours in (
            ("dataset", manifest.dataset, self.dataset),
            ("classes", manifest.classes, self.classes),
            ("features", to_json(manifest.features), to_json(self.spec)),
        ):
            if theirs != ours:
                raise ValueError(
                    f"{self.folder} was written with {name} {str(theirs)[:600]}, now it is {str(ours)[:600]}; "
                    "give another --out, or delete that folder"
                )

    def _finished(self, shard: FeatureShard) -> FeatureReport | None:
        return finished(self.folder, shard.name, self._fingerprint(shard), kind=FeatureReport)

    def _fingerprint(self, shard: FeatureShard) -> str:
        parts = [str(VERSION), to_json(self.spec), *map(to_json, shard.records), *shard.sources]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def _write(self, shard: FeatureShard, results: Iterator[Computed | str]) -> FeatureReport:
        stored: list[tuple[StoredFeatures, int]] = []
        rejected: list[Rejection] = []

        def pairs() -> Iterator[Pair]:
            for record in shard.records:
                computed = next(results)
                try:
                    if isinstance(computed, str):
                        raise ValueError(computed)
                    description, content = self._stored(record, computed)
                except ValueError as error:
                    rejected.append(Rejection(video_id=record.video_id, reason=str(error)))
                else:
                    stored.append((description, zlib.crc32(content)))
                    yield Pair(record.video_id, to_json(description).encode(), content)

        path = self.folder / shard.name
        places = write_tar(path, pairs(), suffix=SUFFIX)
        if not places:
            path.unlink()
        return FeatureReport(
            fingerprint=self._fingerprint(shard),
            file=shard_file(path, num_videos=len(places)) if places else None,
            videos=tuple(
                _indexed(one, crc32, shard.name, place) for (one, crc32), place in zip(stored, places, strict=True)
            ),
            rejected=tuple(rejected),
        )

    def _stored(self, record: VideoRecord, computed: Computed) -> tuple[StoredFeatures, bytes]:
        channels, num_steps = computed.values.shape
        if channels != self.spec.channels or num_steps == 0:
            raise ValueError(f"has {channels} channels and {num_steps} steps; wanted {self.spec.channels} channels")
        description = StoredFeatures(
            record=record,
            num_steps=num_steps,
            seconds_per_step=computed.seconds_per_step,
            start_seconds=computed.start_seconds,
            source=computed.source,
        )
        return description, pack_features(computed.values, dtype=self.spec.dtype)

    def _finish(self, reports: Sequence[FeatureReport]) -> None:
        """Write the index, then the manifest; whoever finds all shards there may do it, and writes the same bytes."""
        videos = [video for report in reports for video in report.videos]
        files = tuple(report.file for report in reports if report.file is not None)
        rejected = tuple(rejection for report in reports for rejection in report.rejected)
        if not videos:
            raise ValueError(f"none of the {len(rejected)} videos has usable features; the first: {rejected[0]}")
        index = "".join(to_json(video) + "\n" for video in videos)
        manifest = FeatureManifest(
            format=FORMAT,
            version=VERSION,
            dataset=self.dataset,
            subset=self.subset,
            classes=self.classes,
            features=self.spec,
            totals=FeatureTotals(
                videos=len(videos),
                steps=sum(video.num_steps for video in videos),
                num_bytes=sum(file.num_bytes for file in files),
            ),
            rejected=rejected,
            index_sha256=hashlib.sha256(index.encode()).hexdigest(),
            shards=files,
        )
        write_atomically(self.folder / INDEX_NAME, index)
        write_atomically(self.folder / MANIFEST_NAME, to_json(manifest))


def _indexed(stored: StoredFeatures, crc32: int, shard: str, place: tuple[int, int]) -> IndexedFeatures:
    return IndexedFeatures(
        record=stored.record,
        shard=shard,
        offset=place[0],
        num_bytes=place[1],
        num_steps=stored.num_steps,
        seconds_per_step=stored.seconds_per_step,
        start_seconds=stored.start_seconds,
        crc32=crc32,
    )
