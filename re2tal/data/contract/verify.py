"""Read every byte of a shard folder and report damage.

Opening a folder compares names, sizes and counts; this compares contents: each tar's sha256 with the manifest, each
video's crc32 and description with the index, the members with what a shard may hold, and the videos' tables with what
can be read by frame number. No picture is decoded.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path

from re2tal.data.contract.feature_manifest import FeatureSpec, IndexedFeatures, StoredFeatures
from re2tal.data.contract.features import unpack_features
from re2tal.data.contract.folder_checks import check_index_sha256
from re2tal.data.contract.manifest import INDEX_NAME, IndexedVideo, StoredVideo, from_json
from re2tal.data.contract.members import check_frames, read_pair
from re2tal.data.contract.mp4 import read_mp4
from re2tal.data.contract.shards import FeatureSet, ShardSet
from re2tal.files import sha256_of


def damage(shards: ShardSet | FeatureSet) -> Iterator[str]:
    """Problems of a folder, one line each; none where every byte is as it was built."""
    # First, because it raises where the folder is on another machine.
    tars = [(shard, shards.path(shard.name)) for shard in shards.manifest.shards]
    try:
        check_index_sha256(shards.root, shards.manifest)
    except ValueError as error:
        yield str(error)
    for shard, path in tars:
        try:
            sha256 = sha256_of(path)
        except OSError as error:
            yield f"{path} cannot be read: {error.strerror or error}"
            continue
        if sha256 == shard.sha256:
            continue
        yield f"{path}: sha256 is {sha256[:12]}..., the manifest says {shard.sha256[:12]}...; delete it and build again"
    seen: set[str] = set()
    # By number: an entry that cannot be parsed is one problem, and the next ones are still looked at.
    for number in range(len(shards.videos)):
        try:
            video = shards.videos[number]
        except ValueError as error:
            yield str(error)
            continue
        if video.record.video_id in seen:
            yield f"{shards.root / INDEX_NAME}: {video.record.video_id!r} is listed twice"
        seen.add(video.record.video_id)
        try:
            match video:
                case IndexedVideo():
                    check_video(shards.path(video.shard), video)
                case IndexedFeatures() if isinstance(shards, FeatureSet):
                    check_features(shards.path(video.shard), video, shards.manifest.features)
        except (ValueError, OSError) as error:
            yield f"{video.shard} {video.record.video_id}: {error}"


def check_video(path: Path, video: IndexedVideo) -> None:
    """Compare one video's two members with its index entry; ValueError says how they differ."""
    description, mp4 = read_pair(path, video)
    if (crc32 := zlib.crc32(mp4)) != video.crc32:
        raise ValueError(f"crc32 of the mp4 is {crc32}, the index says {video.crc32}")
    stored = from_json(StoredVideo, description, source=f"{video.record.video_id}.json")
    _compare(stored, video, "num_frames", "fps", "width", "height", "damaged_share")
    check_frames(read_mp4(mp4), video)


def check_features(path: Path, video: IndexedFeatures, spec: FeatureSpec) -> None:
    """Compare one video's features and their description with its index entry; ValueError says how they differ."""
    description, content = read_pair(path, video)
    if (crc32 := zlib.crc32(content)) != video.crc32:
        raise ValueError(f"crc32 of the features is {crc32}, the index says {video.crc32}")
    stored = from_json(StoredFeatures, description, source=f"{video.record.video_id}.json")
    _compare(stored, video, "num_steps", "seconds_per_step", "start_seconds")
    unpack_features(content, channels=spec.channels, num_steps=video.num_steps, dtype=spec.dtype)


def _compare(stored: object, video: object, *names: str) -> None:
    for name in names:
        if getattr(stored, name) != getattr(video, name):
            raise ValueError(f"{name} is {getattr(stored, name)} in its json and {getattr(video, name)} in the index")
