"""Prove that a stored file shows what its source shows, and that decord reads it right.

While a file is encoded, some frames of the source are kept small, as a player shows them: by FFmpeg's own conversion to
RGB instead of the filters that the encoder's pictures go through, and by the nearest time found for each by itself.
decord's frames of the stored file are then compared with them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace

from re2tal.data.building.jumps import cell_means
from re2tal.data.building.pictures import is_earlier_shown
from re2tal.data.building.probe import open_video
from re2tal.data.building.shown import Damage, Orientation, colours_of, orientation_of
from re2tal.data.contract.mp4 import read_mp4
from re2tal.data.streaming.decoders.default import count_frames, pictures

# As many are kept of each video while it is encoded: 49 KB.
NUM_SAMPLES = 16
SIDE = 16
"""Pixels of a sample: so few that what compression loses is averaged out."""
MAX_DIFFERENCE = 6.0
"""Mean levels (of 255) between a sample and the same frame as stored."""
_COLORSPACES = {
    "bt601": Colorspace.ITU601,
    "bt709": Colorspace.ITU709,
    "fcc": Colorspace.FCC,
    "smpte240m": Colorspace.SMPTE240M,
    "bt2020": Colorspace.BT2020,
}


@dataclass(frozen=True, slots=True)
class Normalised:
    """What a normalised file holds."""

    num_frames: int
    fps: float
    width: int
    height: int
    damage: Damage = field(default_factory=Damage)
    """Of the source."""
    samples: Mapping[int, np.ndarray] = field(default_factory=dict)
    """Frame number -> what a player shows of the source at its time, (SIDE, SIDE, 3) RGB levels."""


class Samples:
    """Watches the frames of a source go by, and keeps the one nearest to each of a few stored frames' times."""

    def __init__(self, rate: Fraction, num_frames: int, orientation: Orientation) -> None:
        self.pictures: dict[int, np.ndarray] = {}
        self._rate = rate
        self._orientation = orientation
        self._wanted = spread(num_frames)

    def taken_from(self, shown: Iterator[tuple[Fraction, av.VideoFrame]]) -> Iterator[tuple[Fraction, av.VideoFrame]]:
        """The same frames."""
        previous: tuple[Fraction, av.VideoFrame] | None = None
        wanted = list(self._wanted)
        for seconds, frame in shown:
            while wanted and (time := wanted[0] / self._rate) <= seconds:
                is_earlier = previous is not None and is_earlier_shown(time, previous[0], seconds)
                self.pictures[wanted.pop(0)] = self._picture(previous[1] if previous and is_earlier else frame)
            yield seconds, frame
            previous = seconds, frame
        if previous is not None:
            self.pictures.update({number: self._picture(previous[1]) for number in wanted})

    def _picture(self, frame: av.VideoFrame) -> np.ndarray:
        full_range, matrix = colours_of(frame)
        rgb = frame.reformat(
            format="rgb24",
            src_colorspace=_COLORSPACES[matrix],
            src_color_range=ColorRange.JPEG if full_range else ColorRange.MPEG,
            dst_color_range=ColorRange.JPEG,
        )
        turned = (orientation_of(frame) or self._orientation).turned(rgb.to_ndarray())
        return small(turned)


def spread(num_frames: int) -> list[int]:
    """Numbers of the frames that are compared, the first and the last among them."""
    return np.unique(np.linspace(0, num_frames - 1, num=NUM_SAMPLES).round().astype(int)).tolist()


def small(picture: np.ndarray) -> np.ndarray:
    """(H, W, 3) -> (SIDE, SIDE, 3), means of as many stretches of rows and columns."""
    return cell_means(picture, SIDE)


def check_normalised(path: Path, expected: Normalised, *, max_difference: float = MAX_DIFFERENCE) -> None:
    """Prove that decord gives the right frames of a normalised file; may hang on one that is not, so call it isolated.

    Compared are the number of frames, the time of each, and some pictures with what a player shows of the source.
    """
    _check_times(path, expected)
    video = path.read_bytes()
    if (seen := count_frames(video)) != expected.num_frames:
        raise ValueError(f"{path}: decord sees {seen} frames of {expected.num_frames} that were encoded")
    numbers = spread(expected.num_frames)
    part, places = read_mp4(video).cut(numbers)  # as the readers do
    for number, picture in zip(numbers, pictures(part, places), strict=True):
        difference = np.abs(small(picture) - expected.samples[number]).mean()
        if difference > max_difference:
            raise ValueError(
                f"{path}: frame {number} is another one than the source shows, or looks different (mean difference "
                f"{difference:.1f} levels)"
            )


def _check_times(path: Path, expected: Normalised) -> None:
    with open_video(path) as (container, stream):
        shown = [(p.pts, p.time_base, p.is_discard) for p in container.demux(stream) if p.size]
    times = sorted(float(pts * base) for pts, base, _ in shown if pts is not None)
    if any(hidden for _, _, hidden in shown) or len(times) != expected.num_frames:
        raise ValueError(f"{path}: {len(times)} frames stored, {expected.num_frames} encoded")
    off = np.abs(np.array(times) - np.arange(len(times)) / expected.fps).max()
    # What a clock of milliseconds rounds.
    if off > 0.001:
        raise ValueError(f"{path}: a stored frame is {off:.4f} s away from its time")
