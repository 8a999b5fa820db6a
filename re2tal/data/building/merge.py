"""Join shard folders of one subset: their tars are linked under new names, or copied, and their indexes put together.

Each video is read and checked against its entry, as `re2tal shards verify` does; one that does not fit is left out.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from re2tal.data.building.labels import twin_problems
from re2tal.data.building.shard_folder import NothingUsableError, totals_of
from re2tal.data.contract.commit import commit
from re2tal.data.contract.manifest import MANIFEST_NAME, IndexedVideo, Manifest, Rejection, ShardFile
from re2tal.data.contract.shards import ShardSet
from re2tal.data.contract.verify import check_video
from re2tal.video_ids import composed

MAX_SHOWN = 10


def merged_classes(folders: Iterable[ShardSet]) -> tuple[str, ...]:
    """The classes of the first folder, then the others that the next ones have; ValueError for two spellings of one."""
    classes = tuple(dict.fromkeys(label for shards in folders for label in shards.classes))
    if twins := twin_problems(classes, " with `re2tal shards annotate`"):
        raise ValueError("; ".join(twins[:MAX_SHOWN]))
    return classes


Skipped = Mapping[Path, Mapping[str, str]]
"""Folder -> video id -> why the video is not taken from there; empty where another folder has the very same."""


def skipped_videos(folders: Sequence[ShardSet]) -> Skipped:
    """Videos that are in several folders: of equal ones the first is taken, of those that differ none.

    Raises ValueError for a folder that is given twice.
    """
    if again := [one for one, count in Counter(shards.root.resolve() for shards in folders).items() if count > 1]:
        raise ValueError(f"{again[0]} is given twice; give each folder once")
    homes: dict[str, list[tuple[Path, IndexedVideo]]] = {}
    for shards in folders:
        for video in shards.videos:
            homes.setdefault(composed(video.record.video_id), []).append((shards.root, video))
    skipped: dict[Path, dict[str, str]] = {}
    for found in homes.values():
        _, first = found[0]
        is_one = all((video.record, video.crc32) == (first.record, first.crc32) for _, video in found)
        places = " and in ".join(str(root) for root, _ in found)
        why = "" if is_one else f"it is in {places}, and differs; leave it out of one with `re2tal shards annotate`"
        # A bool as an index: of equal ones all but the first, of others all.
        for root, video in found[is_one:] if len(found) > 1 else ():
            skipped.setdefault(root, {})[video.record.video_id] = why
    return skipped


def same_pictures(folders: Sequence[ShardSet]) -> list[str]:
    """What to say of videos that have the same bytes as one of another folder, under another id: a sentence each."""
    first: dict[tuple[int, int], tuple[str, Path]] = {}
    said = []
    for shards in folders:
        for video_id, video in shards.by_id.items():
            other, root = first.setdefault((video.crc32, video.num_frames), (video_id, shards.root))
            if root != shards.root and other != video_id:
                said.append(f"{video_id!r} of {shards.root} has the bytes of {other!r} of {root}")
    return said


def merge_shards(
    folders: Sequence[ShardSet], out: Path, *, classes: tuple[str, ...], skipped: Skipped | None = None
) -> Manifest:
    """Write `out` from folders of one subset, without what is skipped; gives its manifest."""
    if (out / MANIFEST_NAME).is_file():
        raise ValueError(f"{out} holds shards already; give another --out")
    out.mkdir(parents=True, exist_ok=True)
    entries: list[IndexedVideo] = []
    files: list[ShardFile] = []
    rejected: list[Rejection] = []
    for shards in folders:
        sound = _sound(shards, (skipped or {}).get(shards.root, {}), rejected)
        counts = Counter(video.shard for video in sound)
        names: dict[str, str] = {}
        for file in (file for file in shards.manifest.shards if counts[file.name]):
            names[file.name] = f"shard-{len(files):06d}.tar"
            _link(shards.path(file.name), out / names[file.name])
            files.append(replace(file, name=names[file.name], videos=counts[file.name]))
        entries += [replace(video, shard=names[video.shard]) for video in sound]
    if not entries:
        raise NothingUsableError(rejected)
    manifests = [shards.manifest for shards in folders]
    stored = {entry.record.video_id for entry in entries}
    manifest = replace(
        manifests[0],
        dataset="+".join(dict.fromkeys(one.dataset for one in manifests)),
        classes=classes,
        tools=_joined([one.tools for one in manifests]),
        totals=totals_of(entries, files),
        rejected=(*(r for one in manifests for r in one.rejected if r.video_id not in stored), *rejected),
        shards=tuple(files),
        damaged=tuple(d for one in manifests for d in one.damaged if d.video_id in stored),
    )
    commit(out, entries, lambda index_sha256: replace(manifest, index_sha256=index_sha256))
    return manifest


def _sound(shards: ShardSet, skipped: Mapping[str, str], rejected: list[Rejection]) -> list[IndexedVideo]:
    def problem(video: IndexedVideo) -> str:
        if video.record.video_id in skipped:
            return skipped[video.record.video_id]
        try:
            check_video(shards.path(video.shard), video)
        except (ValueError, OSError) as error:
            return f"{video.shard}: {error}"
        return ""

    videos = list(shards.videos)
    # Reading waits for the disk, and a checksum lets other threads run.
    with ThreadPoolExecutor(8) as pool:
        problems = list(pool.map(problem, videos))
    named = {one.video_id for one in rejected}
    for video, why in zip(videos, problems, strict=True):
        if why and video.record.video_id not in named:
            rejected.append(Rejection(video.record.video_id, why))
    return [
        video for video, why in zip(videos, problems, strict=True) if not why and video.record.video_id not in skipped
    ]


def _link(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    try:
        # A second name for the same bytes. Resolved, or a link would be linked, and break when the folder moves.
        os.link(source.resolve(), target)
    except OSError:  # another disk, or one without links
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        shutil.copyfile(source, temporary)
        os.replace(temporary, target)


def _joined(tools: Sequence[dict[str, str]]) -> dict[str, str]:
    """Versions by tool; of a tool that had several, all."""
    names = dict.fromkeys(name for one in tools for name in one)
    return {name: ", ".join(dict.fromkeys(one[name] for one in tools if name in one)) for name in names}
