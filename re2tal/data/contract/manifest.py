"""What a shard folder's JSON files hold: one dataclass per object, and strict reading of each.

    index.jsonl      one IndexedVideo per line, in shard order
    manifest.json    one Manifest

shards/README.md explains every key for people and other programs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Protocol, TypeVar

from pydantic import Field, TypeAdapter, ValidationError

from re2tal.strict_json import read_json
from re2tal.structures import VideoRecord

INDEX_NAME = "index.jsonl"
MANIFEST_NAME = "manifest.json"

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
ShardName = Annotated[str, Field(pattern=r"^shard-[0-9]{6}(-[0-9]{1,3})?\.tar$")]
SubsetName = Annotated[str, Field(pattern=r"^[a-z0-9_-]{1,40}$")]
"""It names a folder."""
Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(gt=0)]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class IndexEntry:
    """What the index of a folder of either kind says of a video first: what it shows, and where its bytes are."""

    record: VideoRecord
    shard: ShardName
    """File name of the tar in the folder."""
    offset: Count
    """Where in the tar the header of the first of its two members starts."""
    num_bytes: Positive
    """From `offset` to the end of the padding of the second member: this stretch alone is a readable tar."""


@dataclass(frozen=True, slots=True)
class IndexedVideo(IndexEntry):
    """One video of a shard folder.

    Frame i is what the source shows at i / fps seconds, so the stored video lasts num_frames / fps seconds.
    `record` is what the annotation file says; its duration may differ from the video's by the tolerance that
    shards/README.md gives, and its actions may end that much after the last frame.
    """

    SUFFIX: ClassVar = "mp4"
    """Of its content in the tar."""

    num_frames: Positive
    fps: Annotated[float, Field(gt=0)]
    width: Positive
    height: Positive
    crc32: Annotated[int, Field(ge=0, lt=2**32)]
    """zlib.crc32 of the mp4 member."""
    damaged_share: Share = 0.0
    """Of the source's frames: damaged or missing, so that what is stored in their place is held or wrong."""

    @property
    def num_samples(self) -> int:
        """Number of frames."""
        return self.num_frames

    @property
    def samples_per_second(self) -> float:
        """Frames per second."""
        return self.fps

    @property
    def start_seconds(self) -> float:
        """Where frame 0 begins."""
        return 0.0

    @property
    def video_seconds(self) -> float:
        """How long the stored video lasts."""
        return self.num_frames / self.fps


@dataclass(frozen=True, slots=True)
class FramesPerSecond:
    """Every video is stored at this rate."""

    fps: Annotated[float, Field(gt=0, le=240)]


@dataclass(frozen=True, slots=True)
class FramesPerVideo:
    """Every video is stored as this many frames, however long it lasts."""

    num_frames: Positive


@dataclass(frozen=True, slots=True)
class Encoding:
    """How videos are normalised: the same for all shards of a folder."""

    sampling: FramesPerSecond | FramesPerVideo
    """Which frames are kept."""
    short_side: Annotated[int, Field(ge=16, le=2160, multiple_of=2)] = 256
    """Pixels of the shorter side, for videos that have more; the other side follows, rounded to an even number."""
    gop: Positive = 64
    """Frames from one key frame to the next; decoding slows down below (more restarts) and above (longer seeks)."""
    crf: Count = 23
    """x264's quality; 23 is its default, lower is better and larger."""
    preset: str = "fast"
    """x264's effort."""


@dataclass(frozen=True, slots=True)
class SourceVideo:
    """The file that a stored video was made from."""

    file: str
    """Its name, without folder."""
    sha256: Sha256
    codec: str
    num_frames: Positive
    duration_seconds: float


@dataclass(frozen=True, slots=True)
class StoredVideo:
    """The json member beside each mp4: what the pictures are. What they show is the index's to say; a `record` in the
    member, as earlier builds wrote it, is ignored."""

    num_frames: Positive
    fps: Annotated[float, Field(gt=0)]
    width: Positive
    height: Positive
    source: SourceVideo
    damaged_share: Share = 0.0


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
class DamagedVideo:
    """A video that is stored although some of its source's frames are damaged or missing."""

    video_id: str
    damage: str
    """How many frames, and how."""


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums over a folder, to be compared with its index."""

    videos: Positive
    frames: Positive
    seconds: Annotated[float, Field(gt=0)]
    num_bytes: Positive

    @property
    def num_samples(self) -> int:
        """Number of frames."""
        return self.frames


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a folder holds, and from what it was made."""

    FORMAT: ClassVar = "re2tal-shards"
    VERSION: ClassVar = 1
    MADE_BY: ClassVar = "re2tal shards build"

    format: Literal["re2tal-shards"]
    version: Literal[1]
    dataset: str
    subset: SubsetName
    classes: tuple[str, ...]
    encoding: Encoding
    seed: int
    tools: dict[str, str]
    """Versions of what encoded the videos: the same versions give the same bytes."""
    totals: Totals
    rejected: tuple[Rejection, ...]
    index_sha256: Sha256
    shards: tuple[ShardFile, ...]
    damaged: tuple[DamagedVideo, ...] = ()


def to_json(value: object) -> str:
    """One line of JSON for a dataclass of this module; the same value always gives the same text."""
    return _adapter(type(value)).dump_json(value).decode()


def from_json(kind: type[T], text: bytes, *, source: str) -> T:
    """The dataclass `kind` from its JSON; ValueError names `source`, the key and the value that does not fit."""
    try:
        # Strict: a number in quotes, or 1 for true, is somebody's mistake and not ours to repair.
        return _adapter(kind).validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "content"
        raise ValueError(
            f"{source}: {key} is {str(first['input'])[:80]!r}: {first['msg']}; build the shards again"
        ) from None


class ManifestKind(Protocol):
    """What a manifest of either kind says of itself."""

    FORMAT: ClassVar[str]
    VERSION: ClassVar[int]
    MADE_BY: ClassVar[str]


M = TypeVar("M", bound=ManifestKind)


def read_manifest(path: Path, kind: type[M]) -> M:
    """The manifest in a file; ValueError names the file, the key and the value that does not fit."""
    content = read_json(path)
    if not isinstance(content, dict) or content.get("format") != kind.FORMAT:
        raise ValueError(f"{path} is not a manifest of {kind.FORMAT}; give a folder that `{kind.MADE_BY}` wrote")
    if content.get("version") != kind.VERSION:
        raise ValueError(
            f"{path} has version {content.get('version')!r}, this program reads {kind.VERSION}; make the folder "
            f"again with `{kind.MADE_BY}`, or install the program that wrote it"
        )
    return from_json(kind, path.read_bytes(), source=str(path))


_ADAPTERS: dict[type, TypeAdapter[Any]] = {}


def _adapter(kind: type) -> TypeAdapter[Any]:
    if kind not in _ADAPTERS:  # building one takes a millisecond, an index has thousands of lines
        _ADAPTERS[kind] = TypeAdapter(kind)
    return _ADAPTERS[kind]
