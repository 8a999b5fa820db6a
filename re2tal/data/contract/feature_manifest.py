"""What the JSON files of a feature folder hold: what a backbone saw in each video, computed once and stored.

    index.jsonl      one IndexedFeatures per line, in shard order
    manifest.json    one FeatureManifest

Step j of a video stands for the stretch of time [start_seconds + j * seconds_per_step, ... + (j + 1) * ...], whose
middle is the middle of the frames it was computed from. shards/README.md explains every key for people and other
programs; how these files are read and checked is that of the video shards.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from re2tal.data.contract.manifest import (
    IndexEntry,
    Positive,
    Rejection,
    Sha256,
    ShardFile,
    SubsetName,
)
from re2tal.structures import VideoRecord

Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
StoredType = Literal["float16", "float32"]


@dataclass(frozen=True, slots=True)
class IndexedFeatures(IndexEntry):
    """One video of a feature folder, and where its steps lie in time."""

    SUFFIX: ClassVar = "safetensors"
    """Of its content in the tar."""

    num_steps: Positive
    seconds_per_step: Seconds
    start_seconds: Annotated[float, Field(allow_inf_nan=False)]
    """Where step 0 begins."""
    crc32: Annotated[int, Field(ge=0, lt=2**32)]
    """zlib.crc32 of the safetensors member."""

    @property
    def num_samples(self) -> int:
        """Number of steps."""
        return self.num_steps

    @property
    def samples_per_second(self) -> float:
        """Steps per second."""
        return 1 / self.seconds_per_step


@dataclass(frozen=True, slots=True)
class SecondsPerStep:
    """Every step of every video lasts so long."""

    seconds_per_step: Seconds


@dataclass(frozen=True, slots=True)
class StepsPerVideo:
    """Every video is so many steps, however long it lasts."""

    num_steps: Positive


@dataclass(frozen=True, slots=True)
class FramesPerStep:
    """A step every so many frames of videos whose rates differ."""

    stride_frames: Positive


FeatureGrid = SecondsPerStep | StepsPerVideo | FramesPerStep


@dataclass(frozen=True, slots=True)
class Extracted:
    """Features that `re2tal features extract` computed from video shards."""

    backbone: str
    """Its name, a row of re2tal.backbones.BACKBONES."""
    weights: str
    """Where its weights came from, in words."""
    weights_sha256: Sha256
    """Of the weights and buffers themselves, by name."""
    settings: dict[str, Any]
    """The backbone's whole configuration."""
    clips: dict[str, Any]
    """What the backbone was shown: length and rate of its windows, their overlap, size and fit of the pictures."""
    precision: str
    """What it computed in."""
    shards_sha256: Sha256
    """Of the manifest of the video shards."""


@dataclass(frozen=True, slots=True)
class Packed:
    """Features of another program that `re2tal features pack` took over."""

    window_frames: Positive | None
    """Frames that one step was computed from, the first from frame 0; None where whole videos were resized."""
    fps: Seconds | None
    """The rate that was given for all videos; None where the annotation file says each video's."""
    annotations_sha256: Sha256


@dataclass(frozen=True, slots=True)
class FeatureSpec:
    """What the features of a folder are: the same for all its videos."""

    channels: Positive
    dtype: StoredType
    grid: FeatureGrid
    origin: Extracted | Packed


@dataclass(frozen=True, slots=True)
class SourceFile:
    """The file that features were taken from."""

    file: str
    """Its name, without folder."""
    sha256: Sha256


@dataclass(frozen=True, slots=True)
class StoredFeatures:
    """The json member beside each safetensors."""

    record: VideoRecord
    num_steps: Positive
    seconds_per_step: Seconds
    start_seconds: Annotated[float, Field(allow_inf_nan=False)]
    source: SourceFile | None
    """None where the features were computed from the video of the same id in the shards that the manifest names."""


@dataclass(frozen=True, slots=True)
class FeatureTotals:
    """Sums over a folder, to be compared with its index."""

    videos: Positive
    steps: Positive
    num_bytes: Positive

    @property
    def num_samples(self) -> int:
        """Number of steps."""
        return self.steps


@dataclass(frozen=True, slots=True)
class FeatureManifest:
    """What a folder holds, and from what it was made."""

    FORMAT: ClassVar = "re2tal-features"
    VERSION: ClassVar = 1
    MADE_BY: ClassVar = "re2tal features extract (or pack)"

    format: Literal["re2tal-features"]
    version: Literal[1]
    dataset: str
    subset: SubsetName
    classes: tuple[str, ...]
    features: FeatureSpec
    totals: FeatureTotals
    rejected: tuple[Rejection, ...]
    index_sha256: Sha256
    shards: tuple[ShardFile, ...]
