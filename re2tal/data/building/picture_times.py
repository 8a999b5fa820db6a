"""Whether pictures are lost where time has a gap, or were never coded: what is built on a lost one is wrong.

Then the pictures jump at the next key frame. Where that comes after a gap without a jump, nothing is lost.

AVI            says no times, but pictures of MPEG-4 part 2 do (ISO 14496-2, 6.3.5). A program that captures leaves
               places of the AVI empty, and its encoder, which knows nothing of them, counts time without them.
Matroska       a long gap is a pause of the recording; where frames come when something changes, gaps tell nothing
broadcasts     of MPEG-2 come at an even pace, and nothing else numbers their pictures
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import av
import numpy as np
from av.container import InputContainer
from av.video.stream import VideoStream

from re2tal.data.building.jumps import SPREAD, SUDDEN, Jumps, time_of
from re2tal.data.contract.key_frames import Bits

PAUSE_SECONDS = 2.0
"""A longer gap in a file that is no broadcast is one in the recording: a player goes on showing the picture before."""
# Start codes of the header that says the clock (ISO 14496-2, 6.2.3).
_LAYERS = range(0x20, 0x30)
_B_PICTURE = 2
_ODD_STEP = 1.5
LOST_STEP = 1.75
"""In a broadcast, film frames that repeat a field last 1.5 times as long as others; a lost one leaves a step of 2."""
_USUAL = 30


def is_even(steps: np.ndarray) -> bool:
    """Whether frames come at one pace, a few apart, by the ticks from each to the next; of few frames nothing is known.

    Recordings of a screen often have a frame only where something changes.
    """
    # Fewer steps have no median that means anything.
    if len(steps) < 20:
        return False
    usual = float(np.median(steps))
    return usual > 0 and bool(np.mean(np.abs(steps - usual) <= 0.5 * usual) >= 0.95)


@dataclass(slots=True)
class _Group:
    """A key frame and what follows it, up to the next."""

    key: int | None
    is_counted: list[bool] = field(default_factory=list)
    """Of each packet, whether it is known to be damaged."""
    gap: int | None = None
    """The first packet before which one is missing."""
    num_leading: int = 0
    """Pictures that come after the key frame and are shown before it: made of it and of the group before."""


@dataclass(slots=True)
class _Reference:
    """A picture that is no B-picture. Those that are shown before it, and come after it, tell whether time is whole."""

    group: _Group
    number: int
    step: int
    """Ticks from the one before it."""
    num_between: int = 0


class LostPictures:
    """Follows the packets and frames of a stream."""

    def __init__(self, container: InputContainer, stream: VideoStream) -> None:
        self._has_own_times = container.format.name == "avi" and stream.codec_context.name == "mpeg4"
        is_matroska = container.format.name.startswith("matroska")
        is_broadcast = container.format.name in ("mpegts", "mpeg") and stream.codec_context.name == "mpeg2video"
        self._is_of_use = self._has_own_times or is_matroska or is_broadcast
        self._is_even = is_broadcast
        self._pause = PAUSE_SECONDS / (stream.time_base or 1)
        self._times: list[int] = []
        self._num_found = 0
        self._has_gaps = False
        self._jumps = Jumps()
        self._groups: list[_Group] = []
        self._per_second = 0
        self._ticks: int | None = None
        self._reference: _Reference | None = None
        self._steps: deque[float] = deque(maxlen=_USUAL)
        self._read_layer(bytes(stream.codec_context.extradata or b""))

    def add_shown(self, frame: av.VideoFrame) -> None:
        """The next frame in the order of display."""
        if self._has_gaps:
            self._jumps.add(time_of(frame), frame)

    def follow(self, packet: av.Packet, *, is_counted: bool) -> int:
        """Take what the decoder was given; at the end, gives how many packets are found damaged, uncounted so far."""
        if not self._is_of_use:
            return 0
        if not packet.size:
            self._settle()
            self._num_found += sum(self._damaged(place) for place in range(len(self._groups)))
            return self._num_found if self._has_own_times or self._is_even or self._is_paced() else 0
        if packet.is_keyframe or not self._groups:
            self._groups.append(_Group(time_of(packet)))
            if len(self._groups) == 3:  # the key frame after the first of them is shown by now
                self._num_found += self._damaged(0)
                del self._groups[0]
        if self._has_own_times:
            self._read(bytes(packet), self._groups[-1])
        else:
            self._see_gap(packet, self._groups[-1])
        group = self._groups[-1]
        group.is_counted.append(is_counted)
        # The times of an AVI are guesses.
        if not self._has_own_times and packet.pts is not None and group.key is not None:
            group.num_leading += packet.pts < group.key
        return 0

    def _is_paced(self) -> bool:
        """Whether a long gap is an exception in a Matroska file."""
        steps = np.diff(np.sort(self._times))
        return is_even(steps) and _ODD_STEP * float(np.median(steps)) < self._pause

    def _damaged(self, place: int) -> int:
        group, following = self._groups[place], self._groups[place + 1 : place + 2]
        is_smooth = any(
            0 < self._jumps.at(one.key, num_before=one.num_leading) < (SPREAD if one.num_leading else SUDDEN)
            for one in following
        )
        return 0 if is_smooth or group.gap is None else group.is_counted[group.gap :].count(False)

    def _see_gap(self, packet: av.Packet, group: _Group) -> None:
        """Whether so long nothing comes that a part may be lost as well as never recorded."""
        time = packet.dts if self._is_even else packet.pts
        if time is None:
            return
        self._times.append(time)
        if len(self._times) < 2:
            return
        step, usual = time - self._times[-2], float(np.median(self._steps)) if self._steps else float("inf")
        if step > (LOST_STEP * usual if self._is_even else self._pause) and group.gap is None:
            # What comes before a key frame, nothing behind it needs.
            group.gap, self._has_gaps = (None if packet.is_keyframe else len(group.is_counted)), True
        self._steps.append(step)

    def _settle(self) -> None:
        """See whether time is whole before the latest reference, whose B-pictures have all come."""
        one = self._reference
        if one is None or not one.number:  # before a key frame nothing is missing that others need
            return
        # B-pictures come after the reference, and are shown before it.
        step = one.step / (1 + one.num_between)
        if self._steps and step > _ODD_STEP * float(np.median(self._steps)) and one.group.gap is None:
            one.group.gap, self._has_gaps = one.number, True
        self._steps.append(step)

    def _read(self, packet: bytes, group: _Group) -> None:
        """The times that the pictures of a packet have in themselves (6.2.5)."""
        self._read_layer(packet)
        # The start code of a picture; a packet may hold two.
        place = packet.find(b"\0\0\1\xb6") if self._per_second else -1
        while place >= 0:
            self._read_picture(Bits(packet[place + 4 : place + 40]), group)
            place = packet.find(b"\0\0\1\xb6", place + 4)

    def _read_picture(self, bits: Bits, group: _Group) -> None:
        if bits.take(2) == _B_PICTURE:
            if self._reference:
                self._reference.num_between += 1
            return
        seconds = 0
        # Whole seconds are ones before a zero; damage must not make hours of them.
        while bits.take(1) and seconds < 240:
            seconds += 1
        bits.take(1)
        ticks = bits.take(max(1, (self._per_second - 1).bit_length()))
        step = seconds * self._per_second + ticks - (ticks if self._ticks is None else self._ticks)
        if step == 0 and self._reference:  # it stands for one that came in a packet with another
            return
        self._settle()
        self._ticks, self._reference = ticks, _Reference(group, len(group.is_counted), step)

    def _read_layer(self, content: bytes) -> None:
        """How many ticks a second has, from the header of the video (6.2.3)."""
        place = content.find(b"\0\0\1")
        while 0 <= place < len(content) - 3 and content[place + 3] not in _LAYERS:
            place = content.find(b"\0\0\1", place + 3)
        if not 0 <= place < len(content) - 3:
            return
        bits = Bits(content[place + 4 : place + 40])
        bits.take(9)
        if bits.take(1):
            bits.take(7)
        if bits.take(4) == 15:
            bits.take(16)
        if bits.take(1):  # control parameters
            bits.take(3)
            if bits.take(1):
                # Of the buffer model: sizes and rates.
                bits.take(79)
        bits.take(3)
        self._per_second = bits.take(16)
