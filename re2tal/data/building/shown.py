"""The frames of a video file as a player shows them: when, which way up, in which colours, and how many are damaged.

time 0     where the file begins, which may be before its first picture (sound that starts earlier)
AVI        says no times: the k-th picture that is shown takes the k-th place of the header's rate that holds one
damage     what the decoder refuses or complains of, and all that is built on it, up to the next key frame
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import av
import numpy as np
from av.container import InputContainer
from av.sidedata.sidedata import Type
from av.video.reformatter import ColorRange
from av.video.stream import VideoStream

from re2tal.data.building.consumption import Consumption
from re2tal.data.building.evidence import Evidence
from re2tal.data.building.isolated import still_working
from re2tal.data.building.jumps import time_of
from re2tal.data.building.picture_times import LostPictures

# FFmpeg's own decoders of these show garbage without a word; libvpx, which browsers use, refuses damaged data.
_STRICT_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
_BENIGN = re.compile(r"mmco|number of reference frames|co located|SEI|VUI|vui")
_HEAD_PACKETS = 60
"""A recording of a broadcast begins between two key frames; what comes before the first one is not shown. An AVI is
none, and its decoders would show it."""
# A stream that was cut begins with frames whose references are gone: normal until its second key frame.
_MISSING_REFERENCE = re.compile(r"[Mm]issing reference|reference picture missing|find ref with POC|non-existing")
_MATRICES = {1: "bt709", 4: "fcc", 7: "smpte240m", 9: "bt2020"}
"""Numbers of the H.264 standard -> names of FFmpeg's scaler. Where nothing is said, FFmpeg takes BT.601."""


@dataclass(frozen=True, slots=True)
class Orientation:
    """How decoded pixels are turned, in this order: rows become columns, left becomes right, top becomes bottom."""

    swapped: bool = False
    mirrored: bool = False
    flipped: bool = False

    def filters(self) -> list[tuple[str, str]]:
        """The same in FFmpeg's filters; "cclock_flip" is a plain transposition."""
        steps = [("transpose", "cclock_flip")] * self.swapped + [("hflip", "")] * self.mirrored
        return steps + [("vflip", "")] * self.flipped

    def turned(self, picture: np.ndarray) -> np.ndarray:
        """(H, W, C) as it is shown."""
        picture = picture.swapaxes(0, 1) if self.swapped else picture
        return picture[:: -1 if self.flipped else 1, :: -1 if self.mirrored else 1]


@dataclass(slots=True)
class Damage:
    """What of a file's frames could not be shown soundly."""

    num_frames: int = 0
    """All that should be there."""
    undecodable: int = 0
    """Packets that the decoder refused."""
    corrupt: int = 0
    """Frames that it complained of, or that need a damaged one."""
    missing: int = 0
    """Frames that gaps in time, or the header, say should be there."""
    misplaced: int = 0
    """Frames that come after a later one; they are left out."""
    still_seconds: float = 0.0
    """No damage by itself: where a recording paused, a player goes on showing the picture before."""

    @property
    def num_damaged(self) -> int:
        """Of `num_frames`."""
        return min(self.undecodable + self.corrupt + self.missing + self.misplaced, self.num_frames)

    @property
    def share(self) -> float:
        """Of the frames."""
        return self.num_damaged / max(1, self.num_frames)

    def __str__(self) -> str:
        still = f"its picture stands still for {self.still_seconds:.1f} s, in which it has no frames"
        parts = [self._counts()] * bool(self.num_damaged) + [still] * bool(self.still_seconds)
        return "; ".join(parts)

    def _counts(self) -> str:
        kinds = ("undecodable", "corrupt", "missing", "misplaced")
        parts = ", ".join(f"{count} {kind}" for kind in kinds if (count := getattr(self, kind)))
        return f"{self.num_damaged} of {self.num_frames} frames ({self.share:.1%}) are damaged: {parts}"


def orientation_of(frame: av.VideoFrame) -> Orientation | None:
    """What a frame's display matrix says; None where it has none.

    The matrix a b u, c d v, x y w takes pixel (x, y) to (a x + c y, b x + d y).
    """
    all_data: Any = frame.side_data  # whose declared type is wrong
    found = all_data.get(Type.DISPLAYMATRIX)
    if found is None:
        return None
    a, b, _, c, d, *_ = (int(value) for value in np.frombuffer(bytes(found), np.int32))
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return Orientation(mirrored=a < 0, flipped=d < 0)
    return Orientation(swapped=True, mirrored=c < 0, flipped=b < 0)


def colours_of(frame: av.VideoFrame) -> tuple[bool, str]:
    """(whether black is 0 and white 255 instead of 16 and 235, name of the matrix from RGB)."""
    name = frame.format.name
    full = frame.color_range == ColorRange.JPEG or frame.format.is_rgb or name.startswith(("yuvj", "gray", "ya", "pal"))
    return full, _MATRICES.get(int(frame.colorspace), "bt601")


def origin_seconds(container: InputContainer) -> Fraction | None:
    """Where a player's clock starts, on the clock of the file's time stamps; None where the file does not say."""
    return None if container.start_time is None else Fraction(container.start_time, av.time_base)


def shown_frames(
    container: InputContainer, stream: VideoStream, damage: Damage
) -> Iterator[tuple[Fraction, av.VideoFrame]]:
    """(seconds after the file's beginning, frame) in the order of display; what is damaged is added to `damage`.

    Raises ValueError where frames have no time stamp.
    """
    origin = origin_seconds(container)
    previous = None
    for number, (ticks, frame) in enumerate(_decoded(container, stream, damage)):
        if ticks is None or stream.time_base is None:
            raise ValueError(f"frame {number} has no time stamp; convert the file to mp4")
        if previous is not None and ticks < previous:
            damage.misplaced += 1
            continue
        seconds = ticks * stream.time_base
        if previous is None:
            origin = seconds if origin is None else min(origin, seconds)
        assert origin is not None
        previous = ticks
        yield seconds - origin, frame


def _decoded(
    container: InputContainer, stream: VideoStream, damage: Damage
) -> Iterator[tuple[int | None, av.VideoFrame]]:
    """(time stamp, frame) in the order of display."""
    decoder = stream.codec_context
    if decoder.name in _STRICT_DECODERS:
        decoder = av.CodecContext.create(_STRICT_DECODERS[decoder.name], "r")  # type: ignore[assignment]
        decoder.thread_count = 1
    by_place = _Places() if container.format.name == "avi" else None
    evidence, interlaced = Evidence(container, stream), False
    consumption, lost = Consumption(stream, decoder.name), LostPictures(container, stream)
    broken, in_head, num_keys, num_head, num_sent, num_shown = False, False, 0, 0, 0, 0
    # FFmpeg says what is damaged in its log alone, and counts repeated lines instead of giving them.
    level, skips = av.logging.get_level(), av.logging.get_skip_repeated()
    av.logging.set_level(av.logging.WARNING)
    av.logging.set_skip_repeated(False)
    try:
        with av.logging.Capture() as complaints:
            for packet in container.demux(stream):
                still_working()
                if packet.size:
                    num_keys += packet.is_keyframe
                    in_head = not (num_keys or by_place) and num_sent + num_head < _HEAD_PACKETS
                    num_head += in_head
                    num_sent += not (packet.is_discard or in_head)
                    broken = broken and not packet.is_keyframe
                elif packet.dts is not None:  # an empty chunk of an AVI: the picture before stays
                    continue
                if by_place:
                    by_place.add(packet.dts)
                try:
                    frames = decoder.decode(packet if packet.size else None)
                except av.FFmpegError:
                    damage.undecodable += bool(packet.size) and not in_head
                    broken, frames = True, []
                else:
                    is_lost = evidence.is_lost(packet)  # follows each packet
                    broken = broken or is_lost or _complains(complaints, decoder.name, num_keys < 2)
                    damage.corrupt += broken and bool(packet.size) and not (packet.is_discard or in_head)
                damage.corrupt += consumption.follow(packet, is_counted=broken)
                num_unsound = sum(consumption.needs_more(frame) for frame in frames)
                damage.corrupt += 0 if broken else num_unsound
                damage.corrupt += lost.follow(packet, is_counted=broken or num_unsound > 0)
                complaints.clear()
                for frame in frames:
                    if frame.is_corrupt and not broken:
                        damage.corrupt += 1
                        broken = True
                    num_shown += 1
                    lost.add_shown(frame)
                    interlaced = interlaced or frame.interlaced_frame
                    yield by_place.next() if by_place else time_of(frame), frame
    finally:
        av.logging.set_level(level)
        av.logging.set_skip_repeated(skips)
    if interlaced and abs(num_sent - 2 * num_shown) <= 0.02 * num_sent:  # each field comes in a packet of its own
        num_sent = num_shown
    damage.num_frames += num_sent
    # A decoder may also lose a frame and say nothing.
    damage.missing += max(0, num_sent - num_shown - damage.undecodable - damage.corrupt)


def _complains(messages: Sequence[tuple[int, str, str]], decoder: str, first: bool) -> bool:
    """Whether one of FFmpeg's messages says that a picture is damaged; `first`: the second key frame is to come."""
    return any(
        text.startswith(("Packet corrupt", "CRC mismatch"))  # of a transport stream, of Ogg
        or (
            (level <= av.logging.ERROR and name == decoder)
            and not (_BENIGN.search(text) or (first and _MISSING_REFERENCE.search(text)))
        )
        for level, name, text in messages
    )


class _Places:
    """Time stamps of the pictures of an AVI: what its packets have, in order, given to frames as they are shown.

    A decoder that reorders holds back as many frames as it has been given packets before the first one comes out. From
    then on a packet that gives no frame leaves its place empty.
    """

    def __init__(self) -> None:
        self._places: list[int | None] = []
        self._delay: int | None = None
        self._next = 0
        self._flushing = False

    def add(self, place: int | None) -> None:
        """Of the packet that goes to the decoder now; None ends them."""
        self._flushing = place is None
        if place is not None:
            self._places.append(place)

    def next(self) -> int | None:
        """Of the frame that comes out now."""
        if self._delay is None:
            self._delay = len(self._places) - 1
        if not self._flushing:
            self._next = max(self._next, len(self._places) - 1 - self._delay)
        self._next += 1
        return self._places[self._next - 1] if self._next <= len(self._places) else None
