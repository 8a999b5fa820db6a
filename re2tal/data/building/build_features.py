"""Build feature folders from features of any origin: tars, index and manifest as for videos.

    plans -> missing shards -> features of their videos, in order -> tar and report of each -> manifest

A stopped build goes on with the missing shards. A video without usable features is left out, and the manifest says why.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from re2tal.data.building.shard_folder import (
    REPORTS,
    BuiltSubset,
    NothingUsableError,
    fingerprint,
    refuse_other_settings,
)
from re2tal.data.contract.commit import commit
from re2tal.data.contract.feature_manifest import (
    FeatureManifest,
    FeatureSpec,
    FeatureTotals,
    IndexedFeatures,
    SourceFile,
    StoredFeatures,
)
from re2tal.data.contract.features import pack_features
from re2tal.data.contract.manifest import (
    MANIFEST_NAME,
    Rejection,
    Sha256,
    ShardFile,
    from_json,
    read_manifest,
    to_json,
)
from re2tal.data.contract.shards import Pair, write_tar
from re2tal.files import sha256_of, write_atomically
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
class ShardReport:
    """The result of one shard; stored beside the shards, so that a stopped build can continue."""

    fingerprint: Sha256
    """Of all that the shard was made from."""
    file: ShardFile | None
    """None where every video was rejected."""
    videos: tuple[IndexedFeatures, ...]
    rejected: tuple[Rejection, ...]


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
        (self.folder / REPORTS).mkdir(parents=True, exist_ok=True)
        manifest = self.folder / MANIFEST_NAME
        if manifest.is_file():
            refuse_other_settings(self.folder, read_manifest(manifest, FeatureManifest), self._settings)
        # Every n-th, so that parts are equally long whatever the order of the videos.
        todo = [shard for shard in shards[self.part_index :: self.num_parts] if self._finished(shard) is None]
        if todo:
            manifest.unlink(missing_ok=True)  # what it says no longer holds
            results = compute([record for shard in todo for record in shard.records])
            for shard in todo:
                self._write(shard, results)
        done = [report for shard in shards if (report := self._finished(shard)) is not None]
        if len(done) == len(shards):
            self._finish(done)
            self._remove_leftovers({shard.name for shard in shards})
        return BuiltSubset(
            folder=self.folder,
            num_videos=sum(len(shard.records) for shard in shards),
            num_shards=len(shards),
            num_missing_shards=len(shards) - len(done),
            rejected=tuple(rejection for report in done for rejection in report.rejected),
        )

    @property
    def _settings(self) -> dict[str, Any]:
        """Fields of the manifest that a folder may not change."""
        return {"dataset": self.dataset, "classes": self.classes, "features": self.spec}

    def _fingerprint(self, shard: FeatureShard) -> str:
        # The records are part of it: unlike videos, features have their times from the annotated durations.
        version = str(FeatureManifest.VERSION)
        return fingerprint(version, to_json(self.spec), *map(to_json, shard.records), *shard.sources)

    def _write(self, shard: FeatureShard, results: Iterator[Computed | str]) -> None:
        """Write a shard's tar, unless no video of it can be used, and its report."""
        stored: list[StoredFeatures] = []
        checksums: list[int] = []
        rejected: list[Rejection] = []

        def pairs() -> Iterator[Pair]:
            for record in shard.records:
                computed = next(results)
                try:
                    description, content = self._packed(record, computed)
                except ValueError as error:
                    rejected.append(Rejection(record.video_id, str(error)))
                    continue
                stored.append(description)
                checksums.append(zlib.crc32(content))
                yield Pair(record.video_id, to_json(description).encode(), content)

        path = self.folder / shard.name
        places = write_tar(path, pairs(), suffix=IndexedFeatures.SUFFIX)
        if not places:
            path.unlink()
        videos = tuple(
            IndexedFeatures(
                one.record, shard.name, *place, one.num_steps, one.seconds_per_step, one.start_seconds, crc32
            )
            for one, place, crc32 in zip(stored, places, checksums, strict=True)
        )
        report = ShardReport(
            fingerprint=self._fingerprint(shard),
            file=ShardFile(path.name, path.stat().st_size, sha256_of(path), len(places)) if places else None,
            videos=videos,
            rejected=tuple(rejected),
        )
        write_atomically(self.folder / REPORTS / f"{shard.name}.json", to_json(report))

    def _packed(self, record: VideoRecord, computed: Computed | str) -> tuple[StoredFeatures, bytes]:
        """A video as it goes into its tar; ValueError says why it cannot be used."""
        if isinstance(computed, str):
            raise ValueError(computed)
        channels, num_steps = computed.values.shape
        if channels != self.spec.channels or num_steps == 0:
            raise ValueError(f"has {channels} channels and {num_steps} steps; wanted {self.spec.channels} channels")
        content = pack_features(computed.values, dtype=self.spec.dtype)
        times = computed.seconds_per_step, computed.start_seconds
        return StoredFeatures(record, num_steps, *times, computed.source), content

    def _finished(self, shard: FeatureShard) -> ShardReport | None:
        """The report of a shard that is there and was made from the same records and files."""
        path = self.folder / REPORTS / f"{shard.name}.json"
        if not path.is_file():
            return None
        report = from_json(ShardReport, path.read_bytes(), source=str(path))
        # Made from other files, or with another program: it is made again under its name.
        if report.fingerprint != self._fingerprint(shard):
            return None
        tar = self.folder / shard.name
        if report.file is not None and not (tar.is_file() and tar.stat().st_size == report.file.num_bytes):
            return None
        return report

    def _finish(self, reports: Sequence[ShardReport]) -> None:
        """Write the index, then the manifest; whoever finds all shards there may do it, and writes the same bytes."""
        videos = [video for report in reports for video in report.videos]
        files = tuple(report.file for report in reports if report.file is not None)
        rejected = tuple(rejection for report in reports for rejection in report.rejected)
        if not videos:
            raise NothingUsableError(rejected)
        commit(
            self.folder,
            videos,
            lambda index_sha256: FeatureManifest(
                format="re2tal-features",
                version=1,
                subset=self.subset,
                totals=FeatureTotals(
                    len(videos), sum(one.num_steps for one in videos), sum(file.num_bytes for file in files)
                ),
                rejected=rejected,
                index_sha256=index_sha256,
                shards=files,
                **self._settings,
            ),
        )

    def _remove_leftovers(self, names: set[str]) -> None:
        """Remove leftovers of killed builds and of builds of other files from a complete folder."""
        for path in [*self.folder.glob("shard-*.tar"), *self.folder.glob(".shard-*.tmp")]:
            if path.name not in names:
                path.unlink(missing_ok=True)
        for path in (self.folder / REPORTS).glob("*.json"):
            if path.name.removesuffix(".json") not in names:
                path.unlink(missing_ok=True)
