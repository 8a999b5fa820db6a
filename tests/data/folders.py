"""Shard folders of numbered videos, written without the builder: known bytes at known places."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from data.numbered import HEIGHT, WIDTH

from re2tal.data.contract.manifest import (
    INDEX_NAME,
    MANIFEST_NAME,
    Encoding,
    FramesPerSecond,
    IndexedVideo,
    Manifest,
    ShardFile,
    SourceVideo,
    StoredVideo,
    Totals,
    to_json,
)
from re2tal.data.contract.shards import Pair, ShardSet, open_shards, write_tar
from re2tal.structures import Action, VideoRecord


def indexed(num_frames: int, *, fps: float = 30.0, actions: Sequence[Action] = (), video_id: str = "v") -> IndexedVideo:
    """An index entry for planning; where its bytes are is not told."""
    record = VideoRecord(video_id, "training", num_frames / fps, tuple(actions))
    return IndexedVideo(record, "shard-000000.tar", 0, 1, num_frames, fps, WIDTH, HEIGHT, 0)


def write_shards(
    root: Path, videos: Mapping[str, tuple[bytes, IndexedVideo]], *, per_shard: int, classes: Sequence[str] = ("x",)
) -> ShardSet:
    """A complete folder of `videos`, id -> (mp4, its entry from `indexed`), `per_shard` to a tar."""
    root.mkdir(parents=True)
    items, shards, entries = list(videos.items()), [], []
    for number, first in enumerate(range(0, len(items), per_shard)):
        part, name = items[first : first + per_shard], f"shard-{number:06d}.tar"
        places = write_tar(root / name, [Pair(video_id, _described(entry), mp4) for video_id, (mp4, entry) in part])
        for (video_id, (mp4, entry)), (offset, num_bytes) in zip(part, places, strict=True):
            record = replace(entry.record, video_id=video_id)
            place = {"shard": name, "offset": offset, "num_bytes": num_bytes, "crc32": zlib.crc32(mp4)}
            entries.append(replace(entry, record=record, **place))
        tar = (root / name).read_bytes()
        shards.append(ShardFile(name, len(tar), hashlib.sha256(tar).hexdigest(), len(part)))
    index = "".join(to_json(entry) + "\n" for entry in entries).encode()
    (root / INDEX_NAME).write_bytes(index)
    frames, seconds = sum(e.num_frames for e in entries), sum(e.video_seconds for e in entries)
    manifest = Manifest(
        format="re2tal-shards",
        version=1,
        dataset="numbered",
        subset="training",
        classes=tuple(classes),
        encoding=Encoding(FramesPerSecond(30.0)),
        seed=0,
        tools={},
        totals=Totals(len(entries), frames, seconds, sum(shard.num_bytes for shard in shards)),
        rejected=(),
        index_sha256=hashlib.sha256(index).hexdigest(),
        shards=tuple(shards),
    )
    (root / MANIFEST_NAME).write_text(to_json(manifest))
    return open_shards(root)


def _described(entry: IndexedVideo) -> bytes:
    source = SourceVideo("v.mp4", "0" * 64, "h264", entry.num_frames, entry.video_seconds)
    return to_json(StoredVideo(entry.num_frames, entry.fps, entry.width, entry.height, source)).encode()
