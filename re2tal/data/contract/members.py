"""The two members of one video, read from their place in a tar that may be damaged, or come from anyone.

Only headers of plain files are accepted: a sparse one of two kilobytes could unfold to gigabytes.
"""

from __future__ import annotations

import tarfile
import zlib
from pathlib import Path

from re2tal.data.addresses.remote import RemoteError
from re2tal.data.contract.feature_manifest import IndexedFeatures
from re2tal.data.contract.folder import FeatureSet, ShardSet, read_stretch
from re2tal.data.contract.manifest import IndexedVideo
from re2tal.data.contract.mp4 import Mp4, read_mp4
from re2tal.data.streaming.decode import DecodeError
from re2tal.video_ids import file_key

_BLOCK = 512
MAX_DRIFT_SECONDS = 0.005
"""Times in a file are rounded."""


def read_pair(path: Path, video: IndexedVideo | IndexedFeatures) -> tuple[bytes, bytes]:
    """The json and the other member of a video; ValueError where other members are there."""
    return _pair(read_stretch(path, video), video)


def _pair(stretch: bytes, video: IndexedVideo | IndexedFeatures) -> tuple[bytes, bytes]:
    key = file_key(video.record.video_id)
    description, rest = _member(memoryview(stretch), f"{key}.json")  # whose slices copy nothing
    content, rest = _member(rest, f"{key}.{video.SUFFIX}")
    if rest:
        raise ValueError(f"{len(rest)} bytes lie between this video and the next")
    # Copied only here, so that the stretch of the tar can be freed.
    return bytes(description), bytes(content)


def read_content(shards: ShardSet | FeatureSet, video: IndexedVideo | IndexedFeatures) -> bytes:
    """A video's content out of its shard, checked against the index.

    Raises:
        DecodeError: if it cannot be read, or is not what the index describes.
    """
    place = shards.place(video.shard)
    try:
        _, content = _pair(shards.stretch(video), video)
        if zlib.crc32(content) != video.crc32:
            name = f"{video.record.video_id}.{video.SUFFIX}"
            raise ValueError(f"the checksum of {name} is not the one in the index; the file was changed")
    except RemoteError as error:
        raise DecodeError(str(error)) from None
    except OSError as error:  # deleted, or a disk that fails
        raise DecodeError(f"{place} cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        # Out of the cache, or the damaged bytes would be read again in every epoch.
        shards.forget(video)
        raise DecodeError(f"{place} is damaged at byte {video.offset}: {error}") from None
    return content


def read_video(shards: ShardSet, video: IndexedVideo) -> Mp4:
    """A video out of its shard, checked: the index describes it, and its frames can be read by number.

    Raises:
        DecodeError: if one of these does not hold.
    """
    content = read_content(shards, video)
    try:
        mp4 = read_mp4(content)
        check_frames(mp4, video)
    except ValueError as error:
        raise DecodeError(f"{shards.place(video.shard)}: {video.record.video_id}.mp4: {error}") from None
    return mp4


def check_frames(mp4: Mp4, video: IndexedVideo) -> None:
    """ValueError where the frames of a video are others than its index entry says."""
    drift_seconds = abs(mp4.num_frames / mp4.fps - video.video_seconds)
    # The pictures as the index plans them: another number of frames would shift every window.
    found, wanted = ((one.num_frames, one.width, one.height) for one in (mp4, video))
    if found != wanted or drift_seconds > MAX_DRIFT_SECONDS:
        raise ValueError(
            "{} frames of {}x{} at {:.6g} a second".format(*found, mp4.fps)
            + ", the index says {} of {}x{} at {:.6g}".format(*wanted, video.fps)
            + ": index and video disagree; rebuild the shards"
        )


def _member(stretch: memoryview, name: str) -> tuple[memoryview, memoryview]:
    """(content, what follows) of the plain file called `name` at the start of a stretch of tar."""
    try:
        header = tarfile.TarInfo.frombuf(bytes(stretch[:_BLOCK]), "utf-8", "strict")
    except (tarfile.HeaderError, UnicodeError) as error:
        raise ValueError(f"no readable tar header for {name} ({error})") from None
    # `isreg` takes a sparse file for a plain one.
    if header.name != name or not header.isreg() or header.type == tarfile.GNUTYPE_SPARSE:
        raise ValueError(f"member {header.name[:100]!r} of type {header.type!r} where the plain file {name} should be")
    end = _BLOCK + header.size
    # A tar fills each member up to whole blocks.
    padded = -(-end // _BLOCK) * _BLOCK
    if header.size < 0 or padded > len(stretch):
        raise ValueError(f"{name} claims {header.size} bytes, more than the index gives the pair")
    return stretch[_BLOCK:end], stretch[padded:]
