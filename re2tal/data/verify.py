"""Read every byte of a shard folder and say what is damaged.

Opening a folder compares names, sizes and counts; this compares contents: each tar's sha256 with the manifest, each
video's crc32 and description with the index, and the members with what a shard may hold. Nothing is decoded.
"""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from re2tal.data.manifest import IndexedVideo, StoredVideo, from_json
from re2tal.data.shards import ShardSet
from re2tal.strict_json import sha256_of

_BLOCK = 512


def damage(shards: ShardSet) -> Iterator[str]:
    """Problems of a folder, one line each; none where every byte is as it was built."""
    for shard in shards.manifest.shards:
        path = shards.path(shard.name)
        sha256 = sha256_of(path)
        if sha256 == shard.sha256:
            continue
        yield f"{path}: sha256 is {sha256[:12]}..., the manifest says {shard.sha256[:12]}...; delete it and build again"
    for video in shards.videos:
        try:
            check_video(shards.path(video.shard), video)
        except ValueError as error:
            yield f"{video.shard} {video.record.video_id}: {error}"


def check_video(path: Path, video: IndexedVideo) -> None:
    """Compare one video's two members with its index entry; ValueError says how they differ."""
    description, mp4 = read_pair(path, video)
    if (crc32 := zlib.crc32(mp4)) != video.crc32:
        raise ValueError(f"crc32 of the mp4 is {crc32}, the index says {video.crc32}")
    stored = from_json(StoredVideo, description, source=f"{video.record.video_id}.json")
    for name in ("record", "num_frames", "fps", "width", "height"):
        if getattr(stored, name) != getattr(video, name):
            raise ValueError(f"{name} is {getattr(stored, name)} in its json and {getattr(video, name)} in the index")


def read_pair(path: Path, video: IndexedVideo) -> tuple[bytes, bytes]:
    """The json and the mp4 of a video, read from its place in a tar; ValueError where other members are there."""
    with path.open("rb") as file:
        file.seek(video.offset)
        stretch = file.read(video.num_bytes)
    description, rest = _member(stretch, f"{video.record.video_id}.json")
    mp4, rest = _member(rest, f"{video.record.video_id}.mp4")
    if rest:
        raise ValueError(f"{len(rest)} bytes lie between this video and the next")
    return description, mp4


def _member(stretch: bytes, name: str) -> tuple[bytes, bytes]:
    """(content, what follows) of the plain file called `name` at the start of a stretch of tar."""
    try:
        header = tarfile.TarInfo.frombuf(stretch[:_BLOCK], "utf-8", "strict")
    except (tarfile.HeaderError, UnicodeError) as error:
        raise ValueError(f"no readable tar header for {name} ({error})") from None
    if header.name != name or not header.isreg() or header.type == tarfile.GNUTYPE_SPARSE:
        raise ValueError(f"member {header.name[:100]!r} of type {header.type!r} where the plain file {name} should be")
    end = _BLOCK + header.size
    padded = -(-end // _BLOCK) * _BLOCK
    if header.size < 0 or padded > len(stretch):
        raise ValueError(f"{name} claims {header.size} bytes, more than the index gives the pair")
    return stretch[_BLOCK:end], stretch[padded:]
