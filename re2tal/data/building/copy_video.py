"""Keep a video file as it is, where its frames can be read by number and are what a player shows.

What the readers check each time (`contract.mp4`) decides first: H.264 in an mp4, constant rate, closed groups, upright.
Then every frame is decoded: none may be damaged, late or of another size.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av

from re2tal.data.building.check import Normalised, Samples
from re2tal.data.building.isolated import still_working
from re2tal.data.building.probe import VideoProbe, displayed_size, open_video
from re2tal.data.building.shown import Damage, shown_frames
from re2tal.data.contract.mp4 import read_mp4

COPY_DIFFERENCE = 2.0
"""Mean levels (of 255) between what a player shows and what the decoder gives: nothing was compressed in between."""
_MAX_OFF_SECONDS = 0.001


def check_as_it_is(source: Path, *, probe: VideoProbe) -> Normalised:
    """What a file holds that can be stored as it is; ValueError says why it has to be encoded instead."""
    try:
        mp4 = read_mp4(source.read_bytes())
    except OSError as error:
        raise ValueError(f"{source} cannot be read to its end: {error.strerror}") from None
    damage = Damage(num_frames=probe.num_missing, missing=probe.num_missing)
    samples = Samples(Fraction(mp4.fps), mp4.num_frames, probe.orientation)
    count = 0
    with open_video(source) as (container, stream):
        for number, (seconds, frame) in enumerate(samples.taken_from(_alive(shown_frames(container, stream, damage)))):
            if abs(float(seconds) - number / mp4.fps) > _MAX_OFF_SECONDS:
                raise ValueError(f"frame {number} is shown at {float(seconds):.4f} s, not at {number / mp4.fps:.4f} s")
            if not (frame.width, frame.height) == (mp4.width, mp4.height) == displayed_size(frame, stream):
                raise ValueError(f"frame {number} is not {mp4.width}x{mp4.height} as shown")
            count += 1
    if damage.num_damaged or count != mp4.num_frames:
        raise ValueError(f"{count} of {mp4.num_frames} frames are shown, and {damage}")
    return Normalised(mp4.num_frames, mp4.fps, mp4.width, mp4.height, damage, samples.pictures)


def _alive(shown: Iterator[tuple[Fraction, av.VideoFrame]]) -> Iterator[tuple[Fraction, av.VideoFrame]]:
    for one in shown:
        still_working()
        yield one
