"""Build shard folders: find the videos, make each, write the tars, then the index and the manifest.

    records of a subset, their files -> items -> video_folder: what is new is made, in shards of its own

The same annotations, videos and versions give the same bytes. A stopped build goes on with the shards that are missing.
Other annotations change the index only. A video that cannot be used is left out, and the manifest says why.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from re2tal.data.building.annotations import Annotations
from re2tal.data.building.clips import ClipList
from re2tal.data.building.content import content_id
from re2tal.data.building.make_videos import OnVideo
from re2tal.data.building.named_files import NamedFiles, refuse_shared
from re2tal.data.building.pack_videos import VideoPacker
from re2tal.data.building.probe import MAX_DAMAGED
from re2tal.data.building.shard_folder import BuiltSubset, Listed, fingerprint
from re2tal.data.building.shard_plan import Item
from re2tal.data.building.video_folder import SHARD_BYTES, VideoFolder
from re2tal.data.contract.manifest import Encoding, Manifest, to_json
from re2tal.structures import VideoRecord
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
    folder = VideoFolder(
        out / subset,
        subset,
        settings={"dataset": config.dataset, "encoding": config.encoding},
        classes=annotations.classes,
        seed=config.seed,
        shard_bytes=config.shard_bytes,
        per_shard=config.videos_per_shard,
        kind="shards build --copy" if config.copy else "shards build",
        max_damaged=config.max_damaged,
        workers=config.workers,
        part_index=config.part_index,
        num_parts=config.num_parts,
    )
    packer = VideoPacker(sources, config.encoding, config.max_damaged, config.copy)
    return folder.build(list_items(records, sources, config=config), packer.make, on_video=on_video)


def list_items(records: Sequence[Listed], sources: Mapping[str, Path], *, config: BuildConfig) -> list[Item]:
    """The records with what tells their sources, and how these are stored, from others."""
    base = [str(Manifest.VERSION), PICTURES, to_json(config.encoding), "copy" if config.copy else "encode"]

    def item(listed: Listed) -> Item:
        source = sources.get(listed.video_id)
        if source is None:
            return Item(listed, "")
        seconds = f"{listed.duration_seconds} s, " if isinstance(listed, VideoRecord) else ""
        try:
            mark, status = fingerprint(*base, content_id(source)), source.stat()
        except OSError as error:
            return Item(listed, "", fault=f"{source.name} cannot be read: {error.strerror}; copy it again")
        modified_ns = status.st_mtime_ns
        terms = f"{seconds}{config.max_damaged:g} damaged, {modified_ns}"
        return Item(listed, mark, status.st_size, terms=terms, modified_ns=modified_ns)

    with ThreadPoolExecutor(8) as pool:  # on a disk of the network each file takes a while
        return list(pool.map(item, records))


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
    refuse_shared(folder, {video_id: path.name for video_id, path in found.items()})
    return found
