"""Whether a decoder uses up what it is given: what tells that a picture was made of other bytes than the encoder's.

An arithmetic decoder takes any bytes for a picture. But where they are the encoder's, picture and bytes end together:

    too few    a picture that changes with what stands behind its bytes needed more of them: a second decoder is given
               each packet with more behind it, and has to show the same
    too many   one that does not change with its last bytes did not come to them: key frames are decoded once more with
               others, and those between where the pictures jump back at the next one, or none follows

HEVC and VP8 (libvpx) so, and H.264 its own way (slice_ends.py): FFmpeg's other decoders check by themselves where a
picture ends.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import av
from av.video.stream import VideoStream

from re2tal.data.building.isolated import still_working
from re2tal.data.building.jumps import SUDDEN, Jumps, rows_of, time_of
from re2tal.data.building.slice_ends import SliceEnds
from re2tal.data.contract.key_frames import unit_places

_BEHIND = b"\x55\xaa" * 16
_LAST_BYTES = 16
_HEAD_BYTES = 24
"""More than the header of a slice takes."""
_MAX_KEPT, _MAX_AGAIN = 2000, 600
"""Packets of a group that are kept, and how many are decoded again, which is enough for each of the first 34."""
_AGAIN_PER_PACKET = 2
"""How many more are, of a long video of HEVC with many cuts: decoding takes five times as long at most. Of H.264 all of
the first are, then those before a jump: twice as long at most."""


@dataclass(slots=True)
class _Group:
    """A key frame and what follows it, up to the next; without what is known to be damaged."""

    times: list[int | None] = field(default_factory=list)
    packets: list[bytes] = field(default_factory=list)
    is_known: bool = False
    """Whether its damage is counted already."""


class Consumption:
    """Follows the packets and frames of a stream."""

    def __init__(self, stream: VideoStream, decoder: str) -> None:
        self._name = decoder if decoder in ("hevc", "h264", "libvpx") else None
        self._extradata = stream.codec_context.extradata
        self._length_bytes = 0
        if self._extradata and self._extradata[0] == 1 and len(self._extradata) > 21:
            self._length_bytes = (self._extradata[21] & 3) + 1
        self._ends = SliceEnds(bytes(self._extradata or b"")) if self._name == "h264" else None
        self._second = self._fresh() if self._name and not self._ends else None
        self._shown: dict[int | None, int] = {}
        self._groups: deque[_Group] = deque()
        self._jumps = Jumps()
        self._budget = _MAX_AGAIN

    def follow(self, packet: av.Packet, *, is_counted: bool) -> int:
        """Take what the decoder was given; gives how many earlier packets are found damaged, uncounted so far."""
        if self._name is None:
            return 0
        content, time = bytes(packet), time_of(packet)
        if self._second is not None:
            self._budget += _AGAIN_PER_PACKET
            longer = self._with_more(content) if content else b""
            self._shown.update(_decoded(self._second, longer, time))
        # Of VP8 only this is looked at, whether more behind a packet changes its picture.
        if self._name == "libvpx":
            return 0
        if not content:
            return sum(self._unused(place) for place in range(len(self._groups)))
        found = 0
        if packet.is_keyframe or not self._groups:
            self._groups.append(_Group())
            if len(self._groups) == 3:  # the key frame after the first of them is shown by now
                found = self._unused(0)
                self._groups.popleft()
        group = self._groups[-1]
        if not is_counted and len(group.packets) < _MAX_KEPT:
            group.packets.append(content)
            group.times.append(time)
        return found

    def needs_more(self, frame: av.VideoFrame) -> bool:
        """Whether a frame was made of more bytes than there are."""
        time = time_of(frame)
        if self._name in ("hevc", "h264"):
            self._jumps.add(time, frame)
        # Taken out as it comes, so that what is kept does not grow with the video.
        if self._second is None or self._shown.pop(time, None) == _checksum(frame):
            return False
        for group in self._groups:
            group.is_known = group.is_known or time in group.times
        return True

    def _unused(self, place: int) -> int:
        """How many packets of a group are damaged by one whose last bytes are not used."""
        group = self._groups[place]
        if group.is_known or not group.packets:
            return 0
        following = self._groups[place + 1].times if place + 1 < len(self._groups) else []
        is_smooth = bool(following) and self._jumps.at(following[0]) < SUDDEN
        if self._ends:
            return self._unread(self._ends, group) if self._pays(group) or not is_smooth else 0
        if is_smooth:
            return self._damaged_by(group, [0])
        jumps = [self._jumps.at(time) for time in group.times]
        return self._damaged_by(group, [0, *sorted(range(1, len(jumps)), key=lambda number: -jumps[number])])

    def _pays(self, group: _Group) -> bool:
        self._budget -= len(group.packets)
        return self._budget >= 0

    def _unread(self, ends: SliceEnds, group: _Group) -> int:
        unread = []
        for number, packet in enumerate(group.packets):
            still_working()
            if ends.are_unread(packet):
                unread.append(number)
        # An encoder that puts something behind its slices does so behind most.
        return len(group.packets) - unread[0] if 0 < len(unread) <= max(1, len(group.packets) // 2) else 0

    def _damaged_by(self, group: _Group, order: Sequence[int]) -> int:
        left, whole = min(self._budget, _MAX_AGAIN), self._sums(group.packets[: max(order) + 1], group.times)
        for number in order:
            if number < left:
                left -= number + 1
                self._budget -= number + 1
                if self._ignores_its_end(group, number, whole):
                    return len(group.packets) - number
        return 0

    def _ignores_its_end(self, group: _Group, number: int, whole: dict[int | None, int]) -> bool:
        time = group.times[number]
        # Twice, because other bytes may by chance decode to the same picture.
        for mask in (0x5A, 0xA5):
            other = self._with_another_end(group.packets[number], mask)
            if other is None or time not in whole:
                return False
            if self._sums([*group.packets[:number], other], group.times).get(time) != whole[time]:
                return False
        return True

    def _sums(self, packets: Sequence[bytes], times: Sequence[int | None]) -> dict[int | None, int]:
        decoder, sums = self._fresh(), {}
        for content, time in zip(packets, times, strict=False):
            sums.update(_decoded(decoder, content, time))
        return sums | _decoded(decoder, b"", None)

    def _fresh(self) -> av.VideoCodecContext:
        assert self._name is not None
        decoder = av.CodecContext.create(self._name, "r")
        assert isinstance(decoder, av.VideoCodecContext)
        decoder.extradata, decoder.thread_count = self._extradata, 1
        return decoder

    def _slices(self, packet: bytes) -> list[tuple[int, int]]:
        """Where the slices of a packet of HEVC begin and end, without those of a second view or of transparency."""
        places = unit_places(packet, self._length_bytes)
        return [(start, end) for start, end in places if start + 1 < end and _is_shown_slice(packet[start : start + 2])]

    def _with_more(self, packet: bytes) -> bytes:
        if self._name != "hevc":
            return packet + _BEHIND
        parts, done = [], 0
        for start, end in self._slices(packet):
            head = start - self._length_bytes
            parts.append(packet[done:head])
            if self._length_bytes:
                parts.append((end - start + len(_BEHIND)).to_bytes(self._length_bytes, "big"))
            parts += [packet[start:end].rstrip(b"\0"), _BEHIND]
            done = end
        return b"".join([*parts, packet[done:]])

    def _with_another_end(self, packet: bytes, mask: int) -> bytes | None:
        """The packet with other bytes before the last of its last slice; None where it is too short."""
        slices = self._slices(packet)
        if not slices:
            return None
        start, end = slices[-1]
        size = len(packet[start:end].rstrip(b"\0\3")) - 1  # zeros may follow, in threes with a 3
        if size < _HEAD_BYTES + _LAST_BYTES:
            return None
        changed = bytearray(packet)
        for place in range(start + size - _LAST_BYTES, start + size):
            changed[place] ^= mask
        return bytes(changed)


def _is_shown_slice(head: bytes) -> bool:
    """By the header of a NAL unit (ITU-T H.265, 7.3.1.2): a type below 32 and layer 0."""
    return not head[0] >> 6 and not head[0] & 1 and not head[1] >> 3


def _decoded(decoder: av.VideoCodecContext, content: bytes, time: int | None) -> dict[int | None, int]:
    """Checksums of the frames that come out, by their times; content b"" ends the stream."""
    packet = av.Packet(content) if content else None
    if packet is not None:
        packet.pts = packet.dts = time
    try:
        frames = decoder.decode(packet)
    except av.FFmpegError:
        return {}
    return {time_of(frame): _checksum(frame) for frame in frames}


def _checksum(frame: av.VideoFrame) -> int:
    """Of the colours that are shown: without transparency, and without what rows are padded with."""
    crc32 = 0
    for plane, component in zip(frame.planes[:3], frame.format.components, strict=False):
        rows = rows_of(plane)[:, : plane.width * -(-component.bits // 8)]
        crc32 = zlib.crc32(rows.tobytes(), crc32)
    return crc32
