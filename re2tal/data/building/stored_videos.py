"""Every video in the tars of shard folders, whether their indexes list it or not."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from re2tal.data.building.shard_folder import REPORTS
from re2tal.data.contract.feature_manifest import IndexedFeatures
from re2tal.data.contract.manifest import MANIFEST_NAME, IndexedVideo, from_json
from re2tal.data.contract.members import read_pair
from re2tal.data.contract.shards import FeatureSet, ShardSet

UNLISTED_NAME = "unlisted.jsonl"

AnySet = ShardSet | FeatureSet
Entry = IndexedVideo | IndexedFeatures
Place = tuple[AnySet, Entry]
"""A folder and a video in it."""


def subset_folders(folder: Path) -> list[Path]:
    """A shard folder itself, or those that it holds, one per subset."""
    if (folder / MANIFEST_NAME).is_file() or not folder.is_dir():
        return [folder]
    return [one for one in sorted(folder.iterdir()) if (one / MANIFEST_NAME).is_file()] or [folder]


def stored_videos(opened: Sequence[AnySet]) -> tuple[dict[str, Place], dict[str, list[Place]]]:
    """(video id -> where it is, listed or not; the same for ids that stand for different pictures).

    Listed videos come before others. The same pictures are in two folders after a change that was broken off.
    """
    places: dict[str, list[Place]] = {}
    for shards in opened:
        for entry in shards.videos:
            places.setdefault(entry.record.video_id, []).append((shards, entry))
    listed = set(places)
    for shards in opened:
        for entry in _unlisted(shards):
            if entry.record.video_id not in listed:
                places.setdefault(entry.record.video_id, []).append((shards, entry))
    # By checksum: a change that was broken off leaves the same bytes in two folders, which is no contradiction.
    twice = {video_id: one for video_id, one in places.items() if len({entry.crc32 for _, entry in one}) > 1}
    return {video_id: one[0] for video_id, one in places.items() if video_id not in twice}, twice


def _unlisted(shards: AnySet) -> Iterator[Entry]:
    path = shards.root / REPORTS / UNLISTED_NAME
    kind: Any = IndexedFeatures if isinstance(shards, FeatureSet) else IndexedVideo
    for number, line in enumerate(path.read_bytes().splitlines() if path.is_file() else (), start=1):
        entry: Entry = from_json(kind, line, source=f"{path} line {number}")
        try:
            _, content = read_pair(shards.path(entry.shard), entry)
        except (ValueError, OSError):  # a later build has removed it
            continue
        if zlib.crc32(content) == entry.crc32:
            yield entry
