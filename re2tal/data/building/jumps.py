"""Pictures that differ from the one before them more than those around them do: as where damage ends, at a key frame.

jump of frame k  =  d[k] / median of d around k,   d[k]: largest change of one of 16 x 16 cells, in levels of luma
"""

from __future__ import annotations

from collections import deque
from typing import Any

import av
import numpy as np

SUDDEN = 1.8
"""Where a cut is, or a damaged group ends, it is above 2; from one frame of a scene to the next below 1.5, mostly."""
SPREAD = 1.4
"""Where pictures between the damaged ones and the key frame are made of both, each takes a part of the way back; the
mean of such parts is 1.6, and of as many pictures of a scene 1.1, mostly."""
_AROUND = 8
_SIDE, _STRIDES = 16, 8
# Added to each change: a still scene would else make any grain a jump, and divide by 0.
_NOISE = 2.0
"""Levels that are no change."""
_KEPT = 4096


class Jumps:
    """Follows the frames of a stream in the order of display, and remembers the latest."""

    def __init__(self) -> None:
        self._times: deque[int | None] = deque(maxlen=_KEPT)
        self._changes: deque[float] = deque(maxlen=_KEPT)
        self._before: np.ndarray | None = None

    def add(self, time: int | None, frame: av.VideoFrame) -> None:
        """The next frame."""
        cells, before = _cells(frame), self._before
        self._times.append(time)
        self._changes.append(_NOISE + float(np.abs(cells - before).max()) if before is not None else _NOISE)
        self._before = cells

    def at(self, time: int | None, *, num_before: int = 0) -> float:
        """The jump of a frame, or the mean of it and those of so many before it; 0 where it is not known."""
        if time not in self._times or len(self._times) < _AROUND:
            return 0.0
        place, changes = self._times.index(time), np.array(self._changes)
        first = max(0, place - num_before)
        # Of both sides, so that a scene that moves more from here on is no jump.
        around = np.concatenate([changes[max(0, first - _AROUND) : first], changes[place + 1 : place + 1 + _AROUND]])
        return float(changes[first : place + 1].mean() / np.median(around))


def rows_of(plane: Any) -> np.ndarray:
    """(rows, bytes of a row) of a plane, with what rows are padded with."""
    return np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)


def _cells(frame: av.VideoFrame) -> np.ndarray:
    """(16, 16) means of luma, of a few of the pixels of each cell."""
    plane, bits = frame.planes[0], frame.format.components[0].bits
    rows = rows_of(plane)
    pixels = rows.view(np.uint16) if bits > 8 else rows
    steps = [max(1, side // (_SIDE * _STRIDES)) for side in (frame.height, frame.width)]
    return cell_means(pixels[:: steps[0], : frame.width : steps[1]], _SIDE) / (1 << (bits - 8))


def cell_means(picture: np.ndarray, side: int) -> np.ndarray:
    """(H, W, ...) -> (side, side, ...), means of as many stretches of rows and columns."""
    means = picture
    for axis in (0, 1):
        starts = np.arange(side) * picture.shape[axis] // side
        # A picture may have fewer rows than that: a stretch of none takes one.
        sizes = np.maximum(np.diff(starts, append=picture.shape[axis]), 1)
        sums = np.add.reduceat(means, starts, axis=axis, dtype=np.float32)
        means = sums / sizes.reshape(-1, *[1] * (picture.ndim - 1 - axis))
    return means


def time_of(one: av.Packet | av.VideoFrame) -> int | None:
    """When a packet or frame is shown or, where that is not said, decoded."""
    return one.dts if one.pts is None else one.pts
