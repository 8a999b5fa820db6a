"""Build shard folders: find the videos, normalise each, write the tars, then the index and the manifest.

    records of a subset -> seeded random order -> shards -> (in parallel, or in parts on several machines) tars
                        -> when the last one is there: index.jsonl, then manifest.json

The same annotations, videos and versions give the same bytes. A stopped build goes on with the shards that are missing.
A video that cannot be used is left out, and the manifest says why.
"""

from __future__ import annotations

import hashlib
import queue
import random
import tempfile
import threading
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import av

from re2tal.data.building.annotations import Annotations
from re2tal.data.building.clips import ClipList
from re2tal.data.building.isolated import Isolated
from re2tal.data.building.probe import VIDEO_SUFFIXES
from re2tal.data.building.shard_builder import Listed, OnVideo, ShardBuilder, ShardPlan, Stopped
from re2tal.data.contract.feature_manifest import FeatureReport
from re2tal.data.contract.manifest import (
    FORMAT,
    INDEX_NAME,
    MANIFEST_NAME,
    VERSION,
    Encoding,
    Manifest,
    Rejection,
    ShardReport,
    Totals,
    from_json,
    read_manifest,
    to_json,
)
from re2tal.strict_json import write_atomically

REPORTS = ".reports"
"""Folder of the shard reports inside a shard folder."""

Report = TypeVar("Report", ShardReport, FeatureReport)


@dataclass(frozen=True, slots=True)
class BuildConfig:
    """How to build; everything here but `workers` and the part decides the bytes."""

    dataset: str
    encoding: Encoding
    file_names: tuple[str, ...] = ("{id}", "v_{id}")
    """Names that a video's file may have, without its suffix."""
    blocked: frozenset[str] = frozenset()
    """Ids to leave out without a word: their annotations are known to be wrong."""
    videos_per_shard: int | None = None
    """None: 32 shards or more, of 4 to 64 videos each."""
    seed: int = 0
    """Of the order of the videos."""
    workers: int = 1
    """Processes that encode at a time."""
    part_index: int = 0
    """This run builds the shards whose number is `part_index` modulo `num_parts`."""
    num_parts: int = 1


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

    @property
    def is_complete(self) -> bool:
        """Whether the folder has its manifest and can be opened."""
        return self.num_missing_shards == 0

    @property
    def rejected_share(self) -> float:
        """Share of the videos that could not be used."""
        return len(self.rejected) / self.num_videos


def build_shards(
    annotations: Annotations | ClipList,
    *,
    videos: Path | Mapping[str, Path],
    out: Path,
    subset: str,
    config: BuildConfig,
    on_video: OnVideo = lambda record, rejection: None,
) -> BuiltSubset:
    """Build `out/subset` from the files in the folder `videos`, or from the file of each video id.

    Raises ValueError where nothing can be built, or where `out` holds shards of the same subset that were made with
    other settings. Videos that cannot be used do not raise: see `BuiltSubset.rejected`.
    """
    records: list[Listed] = [record for record in annotations.subset(subset) if record.video_id not in config.blocked]
    if not records:
        raise ValueError(f"every video of subset {subset!r} is blocked; nothing is left to build")
    sources = _find_sources(records, videos, subset=subset, config=config)
    subset = records[0].subset  # "val" of clips is their "validation"
    folder = out / subset
    (folder / REPORTS).mkdir(parents=True, exist_ok=True)
    _refuse_other_settings(folder, annotations, config)
    plans = plan_shards(records, sources, config=config)
    todo = [plan for plan in plans[config.part_index :: config.num_parts] if _finished(folder, plan) is None]
    if todo:
        (folder / MANIFEST_NAME).unlink(missing_ok=True)  # what it says no longer holds
        _build_in_parallel(todo, folder, config=config, on_video=on_video)
    reports = [_finished(folder, plan) for plan in plans]
    done = [report for report in reports if report is not None]
    if len(done) == len(plans):
        _finish(folder, done, subset=subset, classes=annotations.classes, config=config)
        remove_leftovers(folder, {plan.name for plan in plans})
    return BuiltSubset(
        folder=folder,
        num_videos=len(records),
        num_shards=len(plans),
        num_missing_shards=len(plans) - len(done),
        rejected=tuple(rejection for report in done for rejection in report.rejected),
    )


def _find_sources(
    records: Sequence[Listed], videos: Path | Mapping[str, Path], *, subset: str, config: BuildConfig
) -> dict[str, Path]:
    video_ids = [record.video_id for record in records]
    if isinstance(videos, Path):
        sources = find_videos(videos, video_ids, file_names=config.file_names)
        looked = ", ".join(name.format(id=video_ids[0]) + ".mp4" for name in config.file_names)
        fault = f"is in {videos}; looked for {looked}"
    else:
        sources = {video_id: videos[video_id] for video_id in video_ids if videos[video_id].is_file()}
        fault = f"is where it should be; looked for {videos[video_ids[0]]}"
    if not sources:
        raise ValueError(f"none of the {len(records)} videos of subset {subset!r} {fault}")
    return sources


def find_videos(folder: Path, video_ids: Sequence[str], *, file_names: Sequence[str]) -> dict[str, Path]:
    """Video id -> its file, for those that are there; ValueError where an id has two files."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; give the folder that holds the videos")
    files: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in VIDEO_SUFFIXES:
            files.setdefault(path.stem, []).append(path)
    found = {}
    for video_id in video_ids:
        matches = [path for name in file_names for path in files.get(name.format(id=video_id), [])]
        if len(matches) > 1:
            raise ValueError(f"{folder}: video {video_id!r} is there as {[p.name for p in matches]}; keep one of them")
        if matches:
            found[video_id] = matches[0]
    return found


def plan_shards(records: Sequence[Listed], sources: dict[str, Path], *, config: BuildConfig) -> tuple[ShardPlan, ...]:
    """Put records into shards, in an order that depends on the seed alone; videos without a file keep their place."""
    order = list(records)
    random.Random(config.seed).shuffle(order)
    size = config.videos_per_shard or min(64, max(4, -(-len(order) // 32)))
    plans = []
    for number, start in enumerate(range(0, len(order), size)):
        chosen = tuple(order[start : start + size])
        own = {r.video_id: sources[r.video_id] for r in chosen if r.video_id in sources}
        plans.append(
            ShardPlan(
                name=f"shard-{number:06d}.tar",
                records=chosen,
                sources=own,
                fingerprint=_fingerprint(chosen, own, config.encoding),
            )
        )
    return tuple(plans)


def _fingerprint(records: Sequence[Listed], sources: dict[str, Path], encoding: Encoding) -> str:
    parts = [str(VERSION), to_json(encoding)]
    for record in records:
        source = sources.get(record.video_id)
        parts += [to_json(record), f"{source.name} {source.stat().st_size}" if source else "missing"]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _refuse_other_settings(folder: Path, annotations: Annotations | ClipList, config: BuildConfig) -> None:
    path = folder / MANIFEST_NAME
    if not path.is_file():
        return
    manifest = read_manifest(path)
    for name, theirs, ours in (
        ("dataset", manifest.dataset, config.dataset),
        ("encoding", to_json(manifest.encoding), to_json(config.encoding)),
        ("classes", manifest.classes, annotations.classes),
        ("seed", manifest.seed, config.seed),
    ):
        if theirs != ours:
            raise ValueError(
                f"{folder} was built with {name} {str(theirs)[:300]}, now it is {str(ours)[:300]}; "
                "give another --out, or delete that folder"
            )


def finished(folder: Path, name: str, fingerprint: str, *, kind: type[Report]) -> Report | None:
    """The report of the shard called `name`, where it is there and was made from what the fingerprint says."""
    path = folder / REPORTS / f"{name}.json"
    if not path.is_file():
        return None
    report = from_json(kind, path.read_bytes(), source=str(path))
    if report.fingerprint != fingerprint:
        return None
    tar = folder / name
    if report.file is not None and not (tar.is_file() and tar.stat().st_size == report.file.num_bytes):
        return None
    return report


def _finished(folder: Path, plan: ShardPlan) -> ShardReport | None:
    return finished(folder, plan.name, plan.fingerprint, kind=ShardReport)


def _build_in_parallel(plans: Sequence[ShardPlan], folder: Path, *, config: BuildConfig, on_video: OnVideo) -> None:
    waiting: queue.SimpleQueue[ShardPlan] = queue.SimpleQueue()
    for plan in plans:
        waiting.put(plan)
    stop = threading.Event()

    def work() -> None:
        with Isolated() as isolated, tempfile.TemporaryDirectory(prefix="re2tal-shards-") as scratch:
            builder = ShardBuilder(folder, Path(scratch), config.encoding, isolated, on_video, stop)
            while not (stop.is_set() or waiting.empty()):
                try:
                    plan = waiting.get_nowait()
                except queue.Empty:  # another worker took the last one
                    return
                report = builder.build(plan)
                write_atomically(folder / REPORTS / f"{plan.name}.json", to_json(report))

    num_workers = min(config.workers, len(plans))
    with ThreadPoolExecutor(num_workers) as pool:
        futures = [pool.submit(work) for _ in range(num_workers)]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            stop.set()  # an error or Ctrl-C ends the other workers after their current video
    errors = [error for future in futures if (error := future.exception()) is not None]
    for error in sorted(errors, key=lambda error: isinstance(error, Stopped)):  # what stopped them comes first
        raise error


def _finish(
    folder: Path, reports: Sequence[ShardReport], *, subset: str, classes: tuple[str, ...], config: BuildConfig
) -> None:
    """Write the index, then the manifest; whoever finds all shards there may do it, and writes the same bytes."""
    videos = [video for report in reports for video in report.videos]
    shards = tuple(report.file for report in reports if report.file is not None)
    rejected = tuple(rejection for report in reports for rejection in report.rejected)
    if not videos:
        raise ValueError(f"none of the {len(rejected)} videos can be used; the first: {rejected[0]}")
    index = "".join(to_json(video) + "\n" for video in videos)
    manifest = Manifest(
        format=FORMAT,
        version=VERSION,
        dataset=config.dataset,
        subset=subset,
        classes=classes,
        encoding=config.encoding,
        seed=config.seed,
        tools={"av": av.__version__, **{k: ".".join(map(str, v)) for k, v in sorted(av.library_versions.items())}},
        totals=Totals(
            videos=len(videos),
            frames=sum(video.num_frames for video in videos),
            seconds=sum(video.video_seconds for video in videos),
            num_bytes=sum(shard.num_bytes for shard in shards),
        ),
        rejected=rejected,
        index_sha256=hashlib.sha256(index.encode()).hexdigest(),
        shards=shards,
    )
    write_atomically(folder / INDEX_NAME, index)
    write_atomically(folder / MANIFEST_NAME, to_json(manifest))


def remove_leftovers(folder: Path, names: Collection[str]) -> None:
    """Remove what killed builds and builds of other file sets left in a folder of the shards `names`, now complete."""
    for path in [*folder.glob("shard-*.tar"), *folder.glob(".shard-*.tmp")]:
        if path.name not in names:
            path.unlink(missing_ok=True)
    for path in (folder / REPORTS).glob("*.json"):
        if path.name.removesuffix(".json") not in names:
            path.unlink(missing_ok=True)
