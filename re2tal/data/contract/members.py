"""The two members of one video, read from their place in a tar that may be damaged."""

from __future__ import annotations

import tarfile
from pathlib import Path

from re2tal.data.contract.feature_manifest import IndexedFeatures
from re2tal.data.contract.manifest import IndexedVideo

_BLOCK = 512


def read_pair(path: Path, video: IndexedVideo | IndexedFeatures, *, suffix: str = "mp4") -> tuple[bytes, bytes]:
    """The json and the other member of a video; ValueError where other members are there."""
    with path.open("rb") as file:
        file.seek(video.offset)
        stretch = file.read(video.num_bytes)
    description, rest = _member(stretch, f"{video.record.video_id}.json")
    content, rest = _member(rest, f"{video.record.video_id}.{suffix}")
    if rest:
        raise ValueError(f"{len(rest)} bytes lie between this video and the next")
    return description, content


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
