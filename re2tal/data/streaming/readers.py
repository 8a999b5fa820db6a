"""Readers of clips: from a stored video, decoded and cropped, or from stored features.

Each reads one window of a video. Random crops come from the generator that is passed in, so a clip does not depend on
the process that reads it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from re2tal.data.contract.columns import columns_of
from re2tal.data.contract.features import interpolate, read_features
from re2tal.data.contract.members import read_video
from re2tal.data.contract.mp4 import Mp4
from re2tal.data.contract.shards import FeatureSet, ShardSet
from re2tal.data.streaming.augmentation import AUGMENTATIONS, Augmentation
from re2tal.data.streaming.decode import DecoderName, decode_parts
from re2tal.data.streaming.transforms import Box, crop_and_resize, draw_box, square_box
from re2tal.data.streaming.windowing import Slide, Windowing
from re2tal.data.streaming.windows import Window
from re2tal.structures import Batch, ClipBatch, FeatureBatch


class ClipReader(Protocol):
    """Reads the clips of a stream."""

    @property
    def folder(self) -> ShardSet | FeatureSet:
        """Where the videos are."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the content."""

    @property
    def batch(self) -> Callable[..., Batch]:
        """What its clips become."""

    def shape(self, window: Window) -> tuple[int, ...]:
        """Of the content of a clip."""

    def read(self, number: int, window: Window, generator: np.random.Generator, *, into: Tensor) -> None:
        """Fills `into` with a window of the video at place `number` of the index; DecodeError where it is damaged."""


# About ten videos of two minutes (6 MB each at 256 pixels and 30 frames per second), per worker and not per rank.
MAX_OPEN_BYTES = 64 << 20
"""Of the videos that a process keeps open; the last one stays, however large it is."""


class OpenVideos:
    """The videos that were read last, checked: a long one is read once for all its windows."""

    def __init__(self) -> None:
        self._videos: OrderedDict[int, Mp4] = OrderedDict()

    def __reduce__(self) -> tuple[type[OpenVideos], tuple[()]]:
        return OpenVideos, ()  # a worker that is spawned begins with none

    def open(self, folder: ShardSet, number: int) -> Mp4:
        """The video at place `number` of the index; DecodeError where it is damaged."""
        video = self._videos.get(number)
        if video is None:
            video = self._videos[number] = read_video(folder, folder.videos[number])
        # The one in use is the last to go; windows of one video follow each other in an evaluation.
        self._videos.move_to_end(number)
        while len(self._videos) > 1 and sum(len(one.content) for one in self._videos.values()) > MAX_OPEN_BYTES:
            self._videos.popitem(last=False)
        return video


@dataclass(frozen=True)
class FrameReader:
    """Windows of videos as (3, T, size, size) uint8 frames; padding repeats the last frame."""

    folder: ShardSet
    size: int
    fit: Literal["crop", "stretch"]
    crop_area: tuple[float, float]
    """(1, 1): whole pictures"""
    crop_aspect: tuple[float, float]
    flip: bool
    augmentation: Augmentation = "none"
    decoder: DecoderName = "decord"
    opened: OpenVideos = field(default_factory=OpenVideos, repr=False, compare=False)
    dtype: ClassVar[torch.dtype] = torch.uint8
    batch: ClassVar[type[ClipBatch]] = ClipBatch

    def shape(self, window: Window) -> tuple[int, ...]:
        """(3, T, size, size)."""
        return 3, len(window.positions), self.size, self.size

    def read(self, number: int, window: Window, generator: np.random.Generator, *, into: Tensor) -> None:
        """Decoded, and cut, mirrored and augmented alike for all frames."""
        mp4 = self.opened.open(self.folder, number)
        box, flip = self._draw(mp4.height, mp4.width, generator, place=window.crop)
        # Drawn after the box and the mirror bit: the order of draws belongs to a seeded run.
        changes = AUGMENTATIONS[self.augmentation](generator)
        valid = into[:, : window.num_valid]
        # A frame that the clip shows several times is decoded and augmented once.
        unique, back = np.unique(window.indices[: window.num_valid], return_inverse=True)
        is_ascending = len(unique) == len(back) and bool((np.diff(back) > 0).all())
        # In the usual case frames are resized straight into the memory of the batch.
        shown = valid if is_ascending else torch.empty(3, len(unique), self.size, self.size, dtype=self.dtype)
        # Decoders get the few groups of pictures that hold these frames, not the whole video: what they cost grows with
        # its length.
        video, numbers = mp4.cut(unique)
        done = 0
        for frames in decode_parts(video, numbers, frame_bytes=3 * mp4.height * mp4.width, decoder=self.decoder):
            some = shown[:, done : done + len(frames)]
            crop_and_resize(frames, box, size=self.size, flip=flip, into=some)
            done += len(frames)
        for change in changes:
            change(shown)
        if not is_ascending:
            valid.copy_(shown[:, back])
        # As OpenTAD pads: black frames would look like a cut to the convolutions at the end of the valid part.
        into[:, window.num_valid :] = into[:, window.num_valid - 1 : window.num_valid]

    def _draw(self, height: int, width: int, generator: np.random.Generator, *, place: float) -> tuple[Box, bool]:
        """What is cut out of the frames of a clip, and whether it is mirrored."""
        box = square_box(height, width, place=place) if self.fit == "crop" else Box(0, 0, height, width)
        if self.crop_area != (1, 1):
            box = draw_box(height, width, area=self.crop_area, aspect=self.crop_aspect, generator=generator)
        return box, self.flip and bool(generator.random() < 0.5)


@dataclass(frozen=True)
class FeatureReader:
    """Windows of features as (C, T) float32; padding is zero."""

    folder: FeatureSet
    windowing: Windowing
    dtype: ClassVar[torch.dtype] = torch.float32
    batch: ClassVar[type[FeatureBatch]] = FeatureBatch

    def __post_init__(self) -> None:
        """Features are means over stretches of time: taken at another rate, they would lie between two stretches."""
        match self.windowing:
            case Slide(frames_per_second=rate) if rate is not None:
                self._check_rate(rate)
            case Slide(frame_stride=stride) if stride > 1:
                raise ValueError(
                    f"data.clips.windowing.frame_stride is {stride}, but {self.folder.root} holds features, which are "
                    "means over stretches of time and are all taken; set it to 1"
                )

    def _check_rate(self, rate: float) -> None:
        rates = columns_of(self.folder.videos)["samples_per_second"]
        # A thousandth, as in `windows`: rates written with three digits are the same rate.
        if len(others := np.flatnonzero(np.abs(rates - rate) > 1e-3 * rate)):
            video = self.folder.videos[int(others[0])]
            raise ValueError(
                f"data.clips.windowing.frames_per_second is {rate:g}, but the features of {video.record.video_id} "
                f"in {self.folder.root} come at {video.samples_per_second:g} steps per second; give that, or null "
                "(None on the command line) for the rate of each video"
            )

    def shape(self, window: Window) -> tuple[int, ...]:
        """(C, T)."""
        return self.folder.manifest.features.channels, len(window.positions)

    def read(self, number: int, window: Window, generator: np.random.Generator, *, into: Tensor) -> None:
        """Interpolated in time where the window asks for places between two steps."""
        values = read_features(self.folder, self.folder.videos[number])
        into[:, : window.num_valid] = interpolate(values, window.positions[: window.num_valid])
        # Zeros, as ActionFormer pads its features.
        into[:, window.num_valid :] = 0
