"""Build shard folders: find the videos, make each, write the tars, then the index and the manifest.

    records of a subset, their files -> items -> video_folder: what is new is made, in shards of its own

The same annotations, videos and versions give the same bytes. A stopped build goes on with the shards that are missing.
Other annotations change the index only. A video that cannot be used is left out, and the manifest says why.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from re2tal.data.building.annotations import Annotations
from re2tal.data.building.clips import ClipList
from re2tal.data.building.content import content_id
from re2tal.data.building.make_videos import OnVideo
from re2tal.data.building.named_files import Chosen, NamedFiles, videos_in
from re2tal.data.building.pack_videos import VideoPacker
from re2tal.data.building.probe import MAX_DAMAGED
from re2tal.data.building.shard_folder import BuiltSubset, Listed, fingerprint
from re2tal.data.building.shard_plan import NO_FILE, Item
from re2tal.data.building.video_folder import SHARD_BYTES, VideoFolder
from re2tal.data.contract.manifest import Encoding, Manifest, to_json
from re2tal.structures import VideoRecord

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
    copy: bool = False
    """Store files as they came where they can be read by frame number, and encode the others."""
    shard_bytes: int = SHARD_BYTES
    """A shard of more than one video is not larger."""
    videos_per_shard: int | None = None
    """Nor does it hold more videos; None: any number."""
    seed: int = 0
    """Of the order of the videos."""
    workers: int = 1
    """Videos that are encoded at a time, whatever the number of shards."""
    part_index: int = 0
    """This run makes the groups of videos whose number is `part_index` modulo `num_parts`."""
    num_parts: int = 1


def build_shards(
    listed: Annotations | ClipList,
    *,
    videos: Path | None = None,
    out: Path,
    subset: str,
    config: BuildConfig,
    on_start: Callable[[int], None] = lambda num_videos: None,
    on_video: OnVideo = lambda record, rejection: None,
) -> BuiltSubset:
    """Build `out/subset` from the files in the folder `videos`, or from those that the clips name.

    Raises ValueError where nothing can be built, or where `out` holds shards of the same subset that were made with
    other settings. Videos that cannot be used do not raise: see `BuiltSubset.rejected`. `on_start` is told how many
    videos are to be made, `on_video` of each that was.
    """
    records, chosen = find_sources(listed, videos, subset=subset, config=config)
    subset = records[0].subset  # "val" of clips is their "validation"
    folder = VideoFolder(
        out / subset,
        subset,
        settings={"dataset": config.dataset, "encoding": config.encoding},
        classes=listed.classes,
        seed=config.seed,
        shard_bytes=config.shard_bytes,
        per_shard=config.videos_per_shard,
        kind="shards build --copy" if config.copy else "shards build",
        max_damaged=config.max_damaged,
        workers=config.workers,
        part_index=config.part_index,
        num_parts=config.num_parts,
    )
    packer = VideoPacker(chosen.found, config.encoding, config.max_damaged, config.copy)
    items = list_items(records, chosen, config=config)
    built = folder.build(items, packer.make, on_start=on_start, on_video=on_video)
    return replace(built, notes=(*chosen.notes.values(), *sorted(packer.encoded)))


def list_items(records: Sequence[Listed], chosen: Chosen[Path], *, config: BuildConfig) -> list[Item]:
    """The records with what tells their sources, and how these are stored, from others."""
    # All that decides the bytes of a stored video, its source apart. Seed and labels do not.
    base = [str(Manifest.VERSION), PICTURES, to_json(config.encoding), "copy" if config.copy else "encode"]

    def item(listed: Listed) -> Item:
        source = chosen.found.get(listed.video_id)
        if source is None:
            return Item(listed, "", fault=chosen.faults.get(listed.video_id, NO_FILE))
        seconds = f"{listed.duration_seconds} s, " if isinstance(listed, VideoRecord) else ""
        try:
            mark, status = fingerprint(*base, content_id(source)), source.stat()
        except OSError as error:
            return Item(listed, "", fault=f"{source.name} cannot be read: {error.strerror}; copy it again")
        # `content_id` does not read everything: the time tells of a file that was repaired in the middle.
        modified_ns = status.st_mtime_ns
        terms = f"{seconds}{config.max_damaged:g} damaged, {modified_ns}"
        return Item(listed, mark, status.st_size, terms=terms, modified_ns=modified_ns)

    with ThreadPoolExecutor(8) as pool:  # on a disk of the network each file takes a while
        return list(pool.map(item, records))


def find_sources(
    listed: Annotations | ClipList, videos: Path | None, *, subset: str, config: BuildConfig
) -> tuple[list[Listed], Chosen[Path]]:
    """(the videos of a subset that are not blocked, their files); ValueError where there are none."""
    records: list[Listed] = [record for record in listed.subset(subset) if record.video_id not in config.blocked]
    if not records:
        raise ValueError(f"every video of subset {subset!r} is blocked; nothing is left to build")
    video_ids = [record.video_id for record in records]
    if isinstance(listed, Annotations):
        if videos is None:
            raise ValueError("the folder of the videos is not given")
        everyone = [one.video_id for some in listed.subsets.values() for one in some]
        usable = [video_id for video_id in everyone if video_id not in config.blocked]
        files = NamedFiles(videos_in(videos)[0])
        chosen = files.choose(usable, config.file_names, keys=listed.keys).only(video_ids)
        looked = ", ".join(name.format(id=video_ids[0]) + ".mp4" for name in config.file_names)
        fault = f"is in {videos}; looked for {looked}"
    else:
        faults = {video_id: listed.faults[video_id] for video_id in video_ids if video_id in listed.faults}
        paths = {video_id: listed.paths[video_id] for video_id in video_ids if video_id not in faults}
        chosen = Chosen({video_id: path for video_id, path in paths.items() if os.path.isfile(path)}, faults)
        fault = f"is where it should be; looked for {listed.paths[video_ids[0]]}"
    if not chosen.found and not chosen.faults:
        raise ValueError(f"none of the {len(records)} videos of subset {subset!r} {fault}")
    return records, chosen
