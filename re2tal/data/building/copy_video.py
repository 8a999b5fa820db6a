"""Keep a video as it is, where its frames can be read by number and are what a player shows.

What the readers check each time (`contract.mp4`) decides first: H.264, HEVC or VP9 at a constant rate, closed groups,
upright. An mp4 keeps its bytes. Of a Matroska or WebM file the packets do, in a new mp4. Then every frame is decoded:
none may be damaged, late or of another size.
"""

from __future__ import annotations

from fractions import Fraction
from io import BytesIO
from pathlib import Path

import av
import numpy as np

from re2tal.data.building.check import Normalised, Samples
from re2tal.data.building.isolated import still_working
from re2tal.data.building.probe import VideoProbe, displayed_size, open_video
from re2tal.data.building.shown import Orientation, shown_frames
from re2tal.data.contract.mp4 import Mp4, read_mp4

COPY_DIFFERENCE = 2.0
"""Mean levels (of 255) between what a player shows and what the decoder gives: nothing was compressed in between."""
# Matroska rounds times to milliseconds.
_MAX_OFF_SECONDS = 0.001
_REMUXED = {"h264": "H.264", "hevc": "HEVC", "vp9": "VP9", "libvpx-vp9": "VP9"}


def mp4_of(source: Path, *, probe: VideoProbe) -> Mp4:
    """The mp4 to store: the file itself, or one of a Matroska file's packets; ValueError says why there is none."""
    if probe.orientation != Orientation():
        raise ValueError("it is to be turned or mirrored when shown")
    try:
        with open_video(source) as (container, stream):
            if container.format.name.startswith("mov"):
                return read_mp4(source.read_bytes())
            kind = container.format.name.split(",")[0]
            if kind != "matroska" or probe.codec not in _REMUXED:
                raise ValueError(
                    f"it is {probe.codec} in {kind}; {', '.join(dict.fromkeys(_REMUXED.values()))} in mp4, mov, "
                    "mkv or webm can be kept"
                )
            return read_mp4(_remuxed(container, stream))
    except OSError as error:
        raise ValueError(f"{source} cannot be read to its end: {error.strerror}") from None


def _remuxed(container: av.container.InputContainer, stream: av.VideoStream) -> bytes:
    """An mp4 of the same packets, each picture a unit of its rate after the one before it."""
    packets = [packet for packet in container.demux(stream) if packet.size]
    times = [packet.pts for packet in packets if packet.pts is not None]
    if stream.time_base is None or len(times) < len(packets) or any(packet.is_discard for packet in packets):
        raise ValueError("some of its packets have no time, or are not shown")
    rate = _constant_rate((np.sort(times) - min(times)) * float(stream.time_base))
    ranks = np.argsort(np.argsort(times, kind="stable"))
    delay = int((np.arange(len(ranks)) - ranks).max())  # a picture cannot be shown before it is decoded
    file = BytesIO()
    with av.open(file, "w", format="mp4", container_options={"fflags": "+bitexact"}) as target:
        copy = target.add_stream_from_template(stream)
        copy.time_base = 1 / rate
        for number, (packet, rank) in enumerate(zip(packets, ranks.tolist(), strict=True)):
            still_working()
            packet.stream, packet.time_base, packet.duration = copy, 1 / rate, 1
            packet.pts, packet.dts = rank, number - delay
            target.mux(packet)
    return file.getvalue()


def _constant_rate(seconds: np.ndarray) -> Fraction:
    """The rate at which frames are shown at these times, which start at 0 and are rounded to milliseconds."""
    mean = (len(seconds) - 1) / float(seconds[-1]) if len(seconds) > 1 else 30.0
    # Rates as cameras have them, whole or by 1000/1001, before the fraction nearest to the mean.
    usual = (Fraction(round(mean)), Fraction(round(mean) * 1000, 1001), Fraction(mean).limit_denominator(1001))
    for rate in usual:
        if rate and np.abs(seconds - np.arange(len(seconds)) / float(rate)).max() <= _MAX_OFF_SECONDS:
            return rate
    raise ValueError(f"its rate is not constant (about {mean:.3f} frames per second)")


def check_as_it_is(source: Path, mp4: Mp4, *, probe: VideoProbe) -> Normalised:
    """What an mp4 of the source's packets holds; ValueError says why the source has to be encoded instead."""
    damage = probe.damage
    samples = Samples(Fraction(mp4.fps), mp4.num_frames, probe.orientation)
    count = 0
    with open_video(source) as (container, stream):
        for number, (seconds, frame) in enumerate(samples.taken_from(shown_frames(container, stream, damage))):
            if abs(float(seconds) - number / mp4.fps) > _MAX_OFF_SECONDS:
                raise ValueError(f"frame {number} is shown at {float(seconds):.4f} s, not at {number / mp4.fps:.4f} s")
            if not (frame.width, frame.height) == (mp4.width, mp4.height) == displayed_size(frame, stream):
                raise ValueError(f"frame {number} is not {mp4.width}x{mp4.height} as shown")
            count += 1
    if damage.num_damaged or count != mp4.num_frames:
        raise ValueError(f"{count} of {mp4.num_frames} frames are shown, and {damage}")
    return Normalised(mp4.num_frames, mp4.fps, mp4.width, mp4.height, damage, samples.pictures)
