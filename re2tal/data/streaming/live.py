"""Clips of a video that is decoded once, from its first frame to its last: those that `plan_windows` plans.

    pieces of frames -> the last window's worth of them is held -> a clip as soon as a later frame shows that it is not
                                                                   the last one; the last one flush with the end

Neither the length of the video nor whether it ends need be known, so memory does not depend on it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import count
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from re2tal.data.streaming.collate import Clip, collate
from re2tal.data.streaming.transforms import Box, crop_and_resize, square_box
from re2tal.data.streaming.windowing import ResizeWhole, Slide
from re2tal.structures import ClipBatch, Timeline

# Not infinity, which a Timeline refuses.
ENDLESS_SECONDS = 1e12
"""Duration of what has not ended."""


class LiveClip(NamedTuple):
    """A clip and its frames."""

    content: Tensor
    """(3, T, size, size) uint8"""
    mask: Tensor
    """(T,) bool"""
    timeline: Timeline
    video_id: str
    window_id: int


def collate_live(clips: Sequence[LiveClip]) -> ClipBatch:
    """A batch of clips, none of which has a known action."""
    content = torch.stack([clip.content for clip in clips])
    said = [Clip(clip.mask, (), clip.timeline, clip.video_id, clip.window_id, valid=True) for clip in clips]
    return collate(ClipBatch, content, said)


def shaped(pictures: np.ndarray | Tensor, *, size: int, fit: Literal["crop", "stretch"]) -> Tensor:
    """(n, H, W, 3) uint8 RGB -> (3, n, size, size), as an evaluation on shards shapes whole pictures."""
    frames = torch.as_tensor(pictures)
    height, width = frames.shape[1:3]
    box = square_box(height, width) if fit == "crop" else Box(0, 0, height, width)
    return crop_and_resize(frames, box, size=size)


def live_clips(
    pieces: Iterable[Tensor],
    windowing: ResizeWhole | Slide,
    *,
    frames_per_second: float,
    video_id: str = "",
    duration_seconds: float | None = None,
) -> Iterator[LiveClip]:
    """The clips of a video whose frames come in `pieces` (3, n, size, size) at `frames_per_second`.

    With ResizeWhole all of them are the one clip; Slide's short windows come among its long ones. `duration_seconds`
    None: not known before the end; clips before the last ones then have a timeline of ENDLESS_SECONDS. A video without
    a frame has no clip.
    """
    if isinstance(windowing, ResizeWhole):
        yield from _whole(pieces, windowing, frames_per_second, video_id, duration_seconds)
        return
    held, num_frames, numbers, longest = _Held(), 0, count(), windowing.num_frames
    lengths = [longest, *[windowing.short_frames] * bool(windowing.short_share)]
    # As `windows._slides` cuts, or a stream and a file of the same video would give other detections.
    steps = [max(1, round(length * (1 - windowing.overlap))) for length in lengths]
    starts = [0] * len(lengths)

    def clip(first: int, num_valid: int, duration: float) -> LiveClip:
        timeline = Timeline(first / frames_per_second, 1 / frames_per_second, duration)
        return _clip(held.cut(first, num_valid, longest), num_valid, timeline, video_id, next(numbers))

    for piece in pieces:
        held.add(piece)
        num_frames += piece.shape[1]
        for place, length in enumerate(lengths):
            # Strictly more: the last window has to know that it is the last, because the video's end, not a step,
            # places it.
            while num_frames > starts[place] + length:
                yield clip(starts[place], length, duration_seconds or ENDLESS_SECONDS)
                starts[place] += steps[place]
        # Either the next window or, if no frame follows, the one flush with the end may begin there.
        held.forget(min(starts[0], max(0, num_frames - longest)))
    # The last window ends with the video, so it may overlap more than was asked for; a video shorter than a window is
    # padded, and one that a short window would show wholly has none.
    for place, length in enumerate(lengths):
        if num_frames > (length if place else 0):
            duration = duration_seconds or num_frames / frames_per_second
            yield clip(max(0, num_frames - length), min(length, num_frames), duration)


def _whole(
    pieces: Iterable[Tensor],
    windowing: ResizeWhole,
    frames_per_second: float,
    video_id: str,
    duration_seconds: float | None,
) -> Iterator[LiveClip]:
    if duration_seconds is None:
        raise ValueError(
            "this model takes a video as a whole (data.clips.windowing is resize_whole), so it needs a video file, or "
            "frames with a known end; give the file"
        )
    frames = list(pieces)
    if not frames:
        return
    content = torch.cat(frames, dim=1)
    if content.shape[1] != windowing.num_frames:
        raise ValueError(f"{content.shape[1]} frames of the whole video came, {windowing.num_frames} are a clip")
    yield _clip(content, windowing.num_frames, Timeline(0.0, 1 / frames_per_second, duration_seconds), video_id, 0)


def _clip(content: Tensor, num_valid: int, timeline: Timeline, video_id: str, window_id: int) -> LiveClip:
    mask = torch.arange(content.shape[1]) < num_valid
    return LiveClip(content, mask, timeline, video_id, window_id)


class _Held:
    """Pieces of frames from number `first` on."""

    def __init__(self) -> None:
        self._pieces: deque[Tensor] = deque()
        self._first = 0

    def add(self, piece: Tensor) -> None:
        """The frames that follow."""
        self._pieces.append(piece)

    def forget(self, before: int) -> None:
        """Pieces that end before frame `before`."""
        while self._pieces and self._first + self._pieces[0].shape[1] <= before:
            self._first += self._pieces.popleft().shape[1]

    def cut(self, start: int, count: int, length: int) -> Tensor:
        """(3, length, H, W): `count` frames from number `start` on, and the last one again as padding."""
        content = self._pieces[0].new_empty(3, length, *self._pieces[0].shape[2:])
        first = self._first
        for piece in self._pieces:
            low, high = max(start, first), min(start + count, first + piece.shape[1])
            if low < high:
                content[:, low - start : high - start] = piece[:, low - first : high - first]
            first += piece.shape[1]
        content[:, count:] = content[:, count - 1 : count]
        return content
