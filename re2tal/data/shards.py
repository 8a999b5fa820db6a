"""Shards on disk: their index, their manifest, and the checks between the two.

    <out>/<subset>/shard-000000.tar ...    {id}.json, {id}.mp4, {id}.json, ...   one whole normalised video per pair
    <out>/<subset>/index.jsonl             one IndexedVideo per line, in shard order: all that planning needs
    <out>/<subset>/manifest.json           written last; its presence says that the folder is complete

shards/README.md is the contract for people and other programs. `re2tal.data.build` writes such folders.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import Field, TypeAdapter, ValidationError

from re2tal.strict_json import read_json
from re2tal.structures import VideoRecord

FORMAT = "re2tal-shards"
VERSION = 1
INDEX_NAME = "index.jsonl"
MANIFEST_NAME = "manifest.json"
VIDEO_ID = re.compile(r"[A-Za-z0-9_-]{1,80}")
"""A tar member's key ends at the first dot and a slash makes a folder, so neither may be in an id."""

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
ShardName = Annotated[str, Field(pattern=r"^shard-[0-9]{6}\.tar$")]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(gt=0)]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class IndexedVideo:
    """One video of a shard folder: what it shows, and where its bytes are.

    Frame i is what the source shows at i / fps seconds, so the stored video lasts num_frames / fps seconds.
    `record` is what the annotation file says; its duration may differ from the video's by the tolerance that
    shards/README.md gives, and its actions may end that much after the last frame.
    """

    record: VideoRecord
    shard: ShardName
    """File name of the tar in the folder."""
    offset: Count
    """Where in the tar the header of the first of its two members starts."""
    num_bytes: Positive
    """From `offset` to the end of the padding of the second member: this stretch alone is a readable tar."""
    num_frames: Positive
    fps: Annotated[float, Field(gt=0)]
    width: Positive
    height: Positive
    crc32: Annotated[int, Field(ge=0, lt=2**32)]
    """zlib.crc32 of the mp4 member."""

    @property
    def video_seconds(self) -> float:
        """How long the stored video lasts."""
        return self.num_frames / self.fps


@dataclass(frozen=True, slots=True)
class Encoding:
    """How videos were normalised; equal in all shards of a folder."""

    fps: Annotated[float, Field(gt=0)] | None
    """Frames per second of every video; None where every video has `num_frames` frames instead."""
    num_frames: Positive | None
    """Frames of every video; None where every video has `fps` frames per second instead."""
    short_side: Annotated[int, Field(ge=16)]
    gop: Positive
    crf: Count
    preset: str


@dataclass(frozen=True, slots=True)
class ShardFile:
    """One tar of a folder."""

    name: ShardName
    num_bytes: Positive
    sha256: Sha256
    videos: Positive


@dataclass(frozen=True, slots=True)
class Rejection:
    """A video of the annotation file that is in no shard."""

    video_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums over a folder, to be compared with its index."""

    videos: Positive
    frames: Positive
    seconds: Annotated[float, Field(gt=0)]
    num_bytes: Positive


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a folder holds, and from what it was made."""

    format: Literal["re2tal-shards"]
    version: Literal[1]
    dataset: str
    subset: str
    classes: tuple[str, ...]
    encoding: Encoding
    seed: int
    tools: dict[str, str]
    """Versions of what encoded the videos: the same versions give the same bytes."""
    totals: Totals
    rejected: tuple[Rejection, ...]
    index_sha256: Sha256
    shards: tuple[ShardFile, ...]


@dataclass(frozen=True)
class ShardSet:
    """A complete, checked shard folder."""

    root: Path
    manifest: Manifest
    manifest_sha256: str
    """Names this data set in the state that a resumed run compares."""
    videos: tuple[IndexedVideo, ...]
    """In shard order, within a shard in tar order."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; a label's position is its index. The same in all subsets of one annotation file."""
        return self.manifest.classes

    @property
    def subset(self) -> str:
        """Lower-case subset name."""
        return self.manifest.subset

    @cached_property
    def by_id(self) -> dict[str, IndexedVideo]:
        """Videos by id."""
        return {video.record.video_id: video for video in self.videos}

    def path(self, shard: str) -> Path:
        """Where the tar called `shard` is."""
        return self.root / shard


def open_shards(folder: Path | str) -> ShardSet:
    """Open a shard folder and check that its parts belong together; reads no video.

    Raises ValueError where a file is missing, has another size than the manifest says, or contradicts another file.
    """
    root = Path(folder)
    manifest_path, index_path = root / MANIFEST_NAME, root / INDEX_NAME
    _check_is_shard_folder(root)
    manifest_bytes, index_bytes = manifest_path.read_bytes(), index_path.read_bytes()
    manifest = _parse_manifest(manifest_path)
    index_sha256 = hashlib.sha256(index_bytes).hexdigest()
    if index_sha256 != manifest.index_sha256:
        raise ValueError(
            f"{index_path} is not the one that {MANIFEST_NAME} was written for (sha256 {index_sha256[:12]}..., "
            f"manifest says {manifest.index_sha256[:12]}...); {_rebuild(root)}"
        )
    videos = tuple(
        _validate(IndexedVideo, line, source=f"{index_path} line {number}")
        for number, line in enumerate(index_bytes.splitlines(), start=1)
    )
    _check_files(root, manifest)
    _check_index(root, manifest, videos)
    return ShardSet(
        root=root,
        manifest=manifest,
        manifest_sha256=hashlib.sha256(manifest_bytes).hexdigest(),
        videos=videos,
    )


def _parse_manifest(path: Path) -> Manifest:
    content = read_json(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path} is not a manifest of {FORMAT}; give a folder that `re2tal shards build` wrote")
    if content.get("version") != VERSION:
        raise ValueError(
            f"{path} has version {content.get('version')!r}, this program reads {VERSION}; "
            "build the shards again with this program, or install the program that wrote them"
        )
    return _validate(Manifest, path.read_bytes(), source=str(path))


def to_json(value: object) -> str:
    """One line of JSON for any dataclass of this module; the same value always gives the same text."""
    return TypeAdapter(type(value)).dump_json(value).decode()


_ADAPTERS: dict[type, TypeAdapter] = {kind: TypeAdapter(kind) for kind in (Manifest, IndexedVideo)}


def _validate(kind: type[T], text: bytes, *, source: str) -> T:
    try:
        return _ADAPTERS[kind].validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise ValueError(
            f"{source}: {key} is {str(first['input'])[:80]!r}: {first['msg']}; build the shards again"
        ) from None


def _check_is_shard_folder(root: Path) -> None:
    if not root.is_dir():
        raise ValueError(f"{root} is not a folder; {_rebuild(root)}")
    if (root / MANIFEST_NAME).is_file() and (root / INDEX_NAME).is_file():
        return
    inside = sorted(child.name for child in root.iterdir() if (child / MANIFEST_NAME).is_file())
    if inside:
        raise ValueError(f"{root} holds one shard folder per subset; give one of: {[str(root / n) for n in inside]}")
    missing = [name for name in (MANIFEST_NAME, INDEX_NAME) if not (root / name).is_file()]
    raise ValueError(f"{root} has no {' and no '.join(missing)}: it is no complete shard folder; {_rebuild(root)}")


def _rebuild(root: Path) -> str:
    return (
        "build it (a stopped build goes on where it was) with: "
        f"re2tal shards build --videos DIR --annotations FILE --out {root.parent} --subsets {root.name}"
    )


def _check_files(root: Path, manifest: Manifest) -> None:
    for shard in manifest.shards:
        path = root / shard.name
        if not path.is_file():
            raise ValueError(f"{path} is missing, though {MANIFEST_NAME} lists it; {_rebuild(root)}")
        size = path.stat().st_size
        if size != shard.num_bytes:
            raise ValueError(
                f"{path} has {size} bytes, {MANIFEST_NAME} says {shard.num_bytes}: it was cut or changed; "
                f"delete it, then {_rebuild(root)}"
            )


def _check_index(root: Path, manifest: Manifest, videos: tuple[IndexedVideo, ...]) -> None:
    index_path = root / INDEX_NAME
    sizes = {shard.name: shard.num_bytes for shard in manifest.shards}
    counts = Counter(video.shard for video in videos)
    if counts != Counter({shard.name: shard.videos for shard in manifest.shards}) or not videos:
        raise ValueError(
            f"{index_path} lists {len(videos)} videos in {len(counts)} shards, {MANIFEST_NAME} "
            f"{manifest.totals.videos} in {len(manifest.shards)}; {_rebuild(root)}"
        )
    seen: set[str] = set()
    for video in videos:
        problem = _problem(video, manifest, shard_bytes=sizes[video.shard])
        if video.record.video_id in seen:
            problem = "is listed twice"
        if problem:
            raise ValueError(f"{index_path}: {video.record.video_id[:80]!r} {problem}; {_rebuild(root)}")
        seen.add(video.record.video_id)


def _problem(video: IndexedVideo, manifest: Manifest, *, shard_bytes: int) -> str:
    """What is wrong with an index entry; nothing where it is sound."""
    record = video.record
    if not VIDEO_ID.fullmatch(record.video_id):
        return f"is not an id of the form {VIDEO_ID.pattern}"
    if record.subset != manifest.subset:
        return f"belongs to subset {record.subset!r}, not to {manifest.subset!r}"
    if video.offset + video.num_bytes > shard_bytes:
        return f"lies past the end of {video.shard}"
    seconds = [t for action in record.actions for t in (action.start_seconds, action.end_seconds)]
    if not all(map(math.isfinite, (video.fps, record.duration_seconds, *seconds))):
        return "has a time that is not finite"
    unknown = {action.label for action in record.actions} - set(manifest.classes)
    return f"has labels {sorted(unknown)} that are not among the classes of {MANIFEST_NAME}" if unknown else ""
