"""Build shard folders: find the videos, normalise each, write the tars, then the index and the manifest.

    records of a subset -> seeded random order -> shards -> (in parallel, or in parts on several machines) tars
                        -> when the last one is there: index.jsonl, then manifest.json

The same annotations, videos and versions give the same bytes. A stopped build goes on with the shards that are missing.
A video that cannot be used is left out, and the manifest says why.
"""

from __future__ import annotations

import queue
import tempfile
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import av

from re2tal.data.building.annotations import Annotations
from re2tal.data.building.clips import ClipList
from re2tal.data.building.isolated import Isolated
from re2tal.data.building.named_files import NamedFiles
from re2tal.data.building.pack_videos import OnVideo, Stopped, VideoPacker, VideoPlan
from re2tal.data.building.probe import MAX_DAMAGED
from re2tal.data.building.shard_folder import BuiltSubset, Listed, ShardFolder, ShardPlan, fingerprint, share_out
from re2tal.data.contract.manifest import Encoding, IndexedVideo, Manifest, Totals, to_json
from re2tal.video_ids import VIDEO_SUFFIXES

PICTURES = "pictures 2"
"""Increase it whenever the same files give other pictures: older shards are then rebuilt."""


@dataclass(frozen=True, slots=True)
class BuildConfig:
    """How to build; everything here but `workers` and the part decides the bytes."""

    dataset: str
    encoding: Encoding
    file_names: tuple[str, ...] = ("{id}", "v_{id}")
    """Names that a video's file may have, without its suffix."""
    blocked: frozenset[str] = frozenset()
    """Ids to skip silently: their annotations are known to be wrong."""
    max_damaged: float = MAX_DAMAGED
    """Share of a video's frames that may be damaged or missing; above it the video is left out."""
    videos_per_shard: int | None = None
    """None: 32 shards or more, of 4 to 64 videos each."""
    seed: int = 0
    """Of the order of the videos."""
    workers: int = 1
    """Processes that encode at a time."""
    part_index: int = 0
    """This run builds the shards whose number is `part_index` modulo `num_parts`."""
    num_parts: int = 1


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
    written = ShardFolder(
        folder,
        Manifest,
        IndexedVideo,
        settings={
            "dataset": config.dataset,
            "encoding": config.encoding,
            "classes": annotations.classes,
            "seed": config.seed,
        },
        describe=partial(describe_videos, subset),
    )
    return written.build(
        plan_shards(records, sources, config=config),
        partial(_build_in_parallel, written, config=config, on_video=on_video),
        part_index=config.part_index,
        num_parts=config.num_parts,
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
    inside = (path for path in sorted(folder.iterdir()) if path.suffix.lower() in VIDEO_SUFFIXES)
    files = NamedFiles((path.stem, path) for path in inside if path.is_file())  # a link may lead nowhere
    found = {}
    for video_id in video_ids:
        matches = files.of(video_id, file_names)
        if len(matches) > 1:
            raise ValueError(f"{folder}: video {video_id!r} is there as {[p.name for p in matches]}; keep one of them")
        if matches:
            found[video_id] = matches[0]
    return found


def plan_shards(records: Sequence[Listed], sources: dict[str, Path], *, config: BuildConfig) -> tuple[VideoPlan, ...]:
    """Put records into shards, in an order that depends on the seed alone; videos without a file keep their place."""
    plans = []
    for name, chosen in share_out(records, seed=config.seed, per_shard=config.videos_per_shard, most=64):
        own = {r.video_id: sources[r.video_id] for r in chosen if r.video_id in sources}
        parts = [str(Manifest.VERSION), PICTURES, to_json(config.encoding), f"{config.max_damaged:g}"]
        for record in chosen:
            source = own.get(record.video_id)
            parts += [to_json(record), f"{source.name} {source.stat().st_size}" if source else "missing"]
        plans.append(ShardPlan(name, chosen, fingerprint(*parts), own))
    return tuple(plans)


def _build_in_parallel(
    written: ShardFolder, plans: Sequence[VideoPlan], *, config: BuildConfig, on_video: OnVideo
) -> None:
    waiting: queue.SimpleQueue[VideoPlan] = queue.SimpleQueue()
    for plan in plans:
        waiting.put(plan)
    stop = threading.Event()

    def work() -> None:
        with Isolated() as isolated, tempfile.TemporaryDirectory(prefix="re2tal-shards-") as scratch:
            packer = VideoPacker(Path(scratch), config.encoding, config.max_damaged, isolated, on_video, stop)
            while not (stop.is_set() or waiting.empty()):
                try:
                    plan = waiting.get_nowait()
                except queue.Empty:  # another worker took the last one
                    return
                written.write(plan, packer.run(plan))

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


def describe_videos(subset: str, videos: Sequence[IndexedVideo], num_bytes: int) -> dict[str, Any]:
    """The manifest fields that only videos have."""
    return {
        "subset": subset,
        "tools": {"av": av.__version__, **{k: ".".join(map(str, v)) for k, v in sorted(av.library_versions.items())}},
        "totals": Totals(
            videos=len(videos),
            frames=sum(video.num_frames for video in videos),
            seconds=sum(video.video_seconds for video in videos),
            num_bytes=num_bytes,
        ),
    }
