"""Frames that were damaged without a word of the decoder, known by the key frame that puts them right.

A key frame needs no other picture, so behind damage it brings back at once what the pictures before the damage showed:

    sound sound WRONG wrong wrong KEY      many cells jump at the key frame, back to what they were some frames ago

In a sound video the picture before a key frame is nearer to it than older ones are; a cut brings something new.
"""

from __future__ import annotations

from collections import deque

import av
import numpy as np

SIDE = 16
"""Cells of a picture, across and down."""
JUMP = 24.0
"""Levels of brightness that a cell jumps by, at least."""
LEAST_CELLS = 6
TIMES_USUAL = 4
"""More cells jump than so many times those that do from frame to frame elsewhere: what moves fast makes cells jump."""
_LONGEST = 600
"""Frames that are remembered of a group."""


class Healed:
    """Watches the frames of a video go by, and counts those that a key frame tells to have been damaged."""

    def __init__(self) -> None:
        self._cells: deque[np.ndarray] = deque(maxlen=_LONGEST)
        self._steps: deque[int] = deque(maxlen=_LONGEST)

    def add(self, frame: av.VideoFrame) -> int:
        """How many of the frames before this one were damaged, back to the last key frame."""
        cells = _cells(frame)
        if self._cells and self._cells[-1].shape != cells.shape:
            self._cells.clear()
            self._steps.clear()
        if not self._cells:
            self._cells.append(cells)
            return 0
        jump = np.abs(cells - self._cells[-1])
        has_jumped = jump > JUMP
        found = 0
        if frame.key_frame:
            found = self._damaged_before(cells, jump, has_jumped)
            self._cells.clear()
        else:
            self._steps.append(int(has_jumped.sum()))
        self._cells.append(cells)
        return found

    def _damaged_before(self, cells: np.ndarray, jump: np.ndarray, has_jumped: np.ndarray) -> int:
        usual = np.percentile(self._steps, 90) if self._steps else 0
        if has_jumped.sum() < max(LEAST_CELLS, TIMES_USUAL * usual):
            return 0
        before = np.stack(self._cells)[:, has_jumped]
        is_back = (np.abs(before - cells[has_jumped]) < jump[has_jumped] / 4).mean(1) > 0.75
        return len(is_back) - 1 - int(np.flatnonzero(is_back)[-1]) if is_back.any() else 0


def _cells(frame: av.VideoFrame) -> np.ndarray:
    """(SIDE, SIDE) mean levels of brightness; every fourth row of large pictures."""
    plane = frame.reformat(format="gray").planes[0] if frame.format.is_rgb else frame.planes[0]
    wide = frame.format.components[0].bits > 8
    rows = np.frombuffer(bytes(plane), np.uint16 if wide else np.uint8).reshape(plane.height, -1)[:, : plane.width]
    rows = rows[:: 4 if plane.height >= 256 else 1]
    sums = rows
    for axis in (0, 1):
        starts = np.arange(SIDE) * rows.shape[axis] // SIDE
        sums = np.add.reduceat(sums, starts, axis=axis, dtype=np.float32)
    counts = [np.diff(np.arange(SIDE + 1) * length // SIDE).clip(1) for length in rows.shape]
    means = sums / np.outer(*counts)
    return means / (1 << frame.format.components[0].bits - 8) if wide else means
