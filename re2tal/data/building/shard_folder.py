"""A folder of feature shards, written shard by shard; what the folders of videos have in common with it.

    plans -> shards that are missing -> tar, report of each -> when the last is there: index.jsonl, then manifest.json

Parts of one folder may be built by several machines. A stopped build goes on with the shards that are missing.
"""

from __future__ import annotations

import hashlib
import random
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from re2tal.data.building.clips import TrimmedClip
from re2tal.data.contract.commit import commit
from re2tal.data.contract.feature_manifest import FeatureManifest, IndexedFeatures, StoredFeatures
from re2tal.data.contract.manifest import (
    MANIFEST_NAME,
    DamagedVideo,
    IndexedVideo,
    Manifest,
    Rejection,
    Sha256,
    ShardFile,
    Totals,
    from_json,
    read_manifest,
    to_json,
)
from re2tal.data.contract.shards import Pair, write_tar
from re2tal.strict_json import sha256_of, write_atomically
from re2tal.structures import VideoRecord

REPORTS = ".reports"
"""Folder of the shard reports inside a shard folder."""

Listed = VideoRecord | TrimmedClip
"""A video that is to be packed: with actions in it, or one that is a single action, whose length is not known yet."""

Record = TypeVar("Record", bound=Listed)


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """The videos that go into one shard."""

    name: str
    records: tuple[VideoRecord, ...]
    fingerprint: str
    """Of all that the shard is made from."""


@dataclass(frozen=True, slots=True)
class PackedVideo:
    """One video as it goes into its tar."""

    description: StoredFeatures
    content: bytes


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
class BuiltSubset:
    """What a run left behind."""

    folder: Path
    num_videos: int
    """Videos that the annotation file lists and that are not blocked."""
    num_shards: int
    num_missing_shards: int
    """Shards that other parts have still to build."""
    rejected: tuple[Rejection, ...]
    """Known so far."""
    damaged: tuple[DamagedVideo, ...] = ()
    """Stored in spite of it; known so far."""
    num_copies: int = 0
    """Videos that are stored as they came, so that rate and size may differ from the manifest's `encoding`."""
    notes: tuple[str, ...] = ()
    """Files that were not taken beside others of their video, and those that --copy did not keep: a sentence each."""

    @property
    def is_complete(self) -> bool:
        """Whether the folder has its manifest and can be opened."""
        return self.num_missing_shards == 0

    @property
    def rejected_share(self) -> float:
        """Share of the videos that could not be used."""
        return len(self.rejected) / self.num_videos


class NothingUsableError(ValueError):
    """No video of a subset can be used."""

    def __init__(self, rejected: Sequence[Rejection]) -> None:
        first = rejected[0]
        what = f"the first, {first.video_id}: {first.reason}"
        super().__init__(f"none of the {len(rejected)} videos can be used; {what}")


@dataclass(frozen=True, slots=True)
class FeatureFolder:
    """Where shards of features are written, and what all of them have in common."""

    root: Path
    settings: Mapping[str, Any]
    """Fields of the manifest that a folder may not change; the others are counted, or added by `finish`."""
    describe: Callable[[Sequence[IndexedFeatures], int], Mapping[str, Any]]
    """Videos, bytes of all tars -> the other fields of the manifest."""

    def build(
        self,
        plans: Sequence[ShardPlan],
        write_shards: Callable[[Sequence[ShardPlan]], None],
        *,
        part_index: int = 0,
        num_parts: int = 1,
    ) -> BuiltSubset:
        """Write the missing shards of a part; the run that completes the folder writes the manifest.

        `write_shards` calls `write` for each plan it is given. Raises ValueError where the folder holds shards of other
        settings, and where no video can be used.
        """
        (self.root / REPORTS).mkdir(parents=True, exist_ok=True)
        self._refuse_other_settings()
        # Every n-th, so that parts are equally long whatever the order of the videos.
        todo = [plan for plan in plans[part_index::num_parts] if self._finished(plan) is None]
        if todo:
            (self.root / MANIFEST_NAME).unlink(missing_ok=True)  # what it says no longer holds
            write_shards(todo)
        done = [report for plan in plans if (report := self._finished(plan)) is not None]
        if len(done) == len(plans):
            self._finish(done)
            self._remove_leftovers({plan.name for plan in plans})
        return BuiltSubset(
            folder=self.root,
            num_videos=sum(len(plan.records) for plan in plans),
            num_shards=len(plans),
            num_missing_shards=len(plans) - len(done),
            rejected=tuple(rejection for report in done for rejection in report.rejected),
        )

    def write(self, plan: ShardPlan, results: Iterable[PackedVideo | Rejection]) -> None:
        """Write a shard's tar, unless no video of it can be used, and its report."""
        stored: list[dict[str, Any]] = []
        rejected: list[Rejection] = []

        def pairs() -> Iterator[Pair]:
            for result in results:
                if isinstance(result, Rejection):
                    rejected.append(result)
                    continue
                description = result.description
                kept = {one.name: getattr(description, one.name) for one in fields(description) if one.name != "source"}
                stored.append({**kept, "shard": plan.name, "crc32": zlib.crc32(result.content)})
                yield Pair(description.record.video_id, to_json(description).encode(), result.content)

        path = self.root / plan.name
        places = write_tar(path, pairs(), suffix=IndexedFeatures.SUFFIX)
        if not places:
            path.unlink()
        videos: Any = tuple(  # of the entries that this report holds
            IndexedFeatures(**one, offset=offset, num_bytes=num_bytes)
            for one, (offset, num_bytes) in zip(stored, places, strict=True)
        )
        report = ShardReport(
            fingerprint=plan.fingerprint,
            file=ShardFile(path.name, path.stat().st_size, sha256_of(path), len(places)) if places else None,
            videos=videos,
            rejected=tuple(rejected),
        )
        write_atomically(self.root / REPORTS / f"{plan.name}.json", to_json(report))

    def _refuse_other_settings(self) -> None:
        path = self.root / MANIFEST_NAME
        if path.is_file():
            refuse_other_settings(self.root, read_manifest(path, FeatureManifest), self.settings)

    def _finished(self, plan: ShardPlan) -> ShardReport | None:
        """The report of a shard that is there and was made from what its plan says."""
        path = self.root / REPORTS / f"{plan.name}.json"
        if not path.is_file():
            return None
        report = from_json(ShardReport, path.read_bytes(), source=str(path))
        # Made from other files, or with another program: it is made again under its name.
        if report.fingerprint != plan.fingerprint:
            return None
        tar = self.root / plan.name
        if report.file is not None and not (tar.is_file() and tar.stat().st_size == report.file.num_bytes):
            return None
        return report

    def _finish(self, reports: Sequence[ShardReport]) -> None:
        """Write the index, then the manifest; whoever finds all shards there may do it, and writes the same bytes."""
        videos: list[Any] = [video for report in reports for video in report.videos]
        files = tuple(report.file for report in reports if report.file is not None)
        rejected = tuple(rejection for report in reports for rejection in report.rejected)
        head: dict[str, Any] = {"format": FeatureManifest.FORMAT, "version": FeatureManifest.VERSION}
        if not videos:
            raise NothingUsableError(rejected)
        commit(
            self.root,
            videos,
            lambda index_sha256: FeatureManifest(
                **head,
                rejected=rejected,
                index_sha256=index_sha256,
                shards=files,
                **self.settings,
                **self.describe(videos, sum(file.num_bytes for file in files)),
            ),
        )

    def _remove_leftovers(self, names: set[str]) -> None:
        """Remove leftovers of killed builds and of builds of other files from a complete folder."""
        for path in [*self.root.glob("shard-*.tar"), *self.root.glob(".shard-*.tmp")]:
            if path.name not in names:
                path.unlink(missing_ok=True)
        for path in (self.root / REPORTS).glob("*.json"):
            if path.name.removesuffix(".json") not in names:
                path.unlink(missing_ok=True)


def share_out(
    records: Sequence[Record], *, seed: int, per_shard: int | None, most: int
) -> list[tuple[str, tuple[Record, ...]]]:
    """(name, videos) of shards, in an order that depends on the seed alone: `per_shard` to a shard, or as many as give
    32 shards or more, from 4 to `most`."""
    order = list(records)
    # Shuffled once and for all, so that a shard holds videos of all kinds: training shuffles within a span only.
    random.Random(seed).shuffle(order)
    size = per_shard or min(most, max(4, -(-len(order) // 32)))
    starts = range(0, len(order), size)
    return [(f"shard-{number:06d}.tar", tuple(order[start : start + size])) for number, start in enumerate(starts)]


def fingerprint(*parts: str) -> str:
    """One name for all that a shard is made from."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def refuse_other_settings(root: Path, manifest: Manifest | FeatureManifest, settings: Mapping[str, Any]) -> None:
    """ValueError where a folder was built with other settings: these are fields of its manifest."""
    for name, value in settings.items():
        theirs, ours = _shown(getattr(manifest, name)), _shown(value)
        if theirs != ours:
            raise ValueError(
                f"{root} was built with {name} {theirs[:600]}, now it is {ours[:600]}; "
                "give another --out, or delete that folder"
            )


def shards_in_use(files: Sequence[ShardFile], entries: Sequence[IndexedVideo | IndexedFeatures]) -> list[ShardFile]:
    """The shards that hold listed videos, with their number."""
    counts = Counter(entry.shard for entry in entries)
    return [replace(file, videos=counts[file.name]) for file in files if counts[file.name]]


def totals_of(entries: Sequence[IndexedVideo], files: Sequence[ShardFile]) -> Totals:
    """Sums over a folder."""
    return Totals(
        videos=len(entries),
        frames=sum(entry.num_frames for entry in entries),
        seconds=sum(entry.video_seconds for entry in entries),
        num_bytes=sum(file.num_bytes for file in files),
    )


def _shown(value: object) -> str:
    return to_json(value) if is_dataclass(value) else str(value)
