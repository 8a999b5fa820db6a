"""Whether a picture that a file calls a key frame can be decoded without those before it.

H.264     each slice is an I slice: encoders of live video also mark pictures that only begin to refresh the image
HEVC      it is a random access point (types 16 to 21)
VP9       its header says so

Only the first bits of each unit are read (H.264, 7.3; HEVC, 7.3; VP9, 6.2).
"""

from __future__ import annotations

from collections.abc import Iterator

SLICE, KEY_SLICE, SEQUENCE, PICTURE = 1, 5, 7, 8
"""Types of H.264's units."""


def stands_alone(packet: bytes, *, codec: bytes, length_bytes: int) -> bool:
    """Whether a picture of an mp4 needs no other; `codec` is the sample entry's type."""
    if codec == b"vp09":
        # The first byte: a marker of two bits, the profile, `show_existing_frame`, and `frame_type`, where 0 is a key
        # frame.
        is_marked = bool(packet[0] & 4 if packet[0] & 48 != 48 else packet[0] & 2)  # profile 3 has a bit more
        is_repeat = bool(packet[0] & 8 if packet[0] & 48 != 48 else packet[0] & 4)
        return not (is_marked or is_repeat)
    if codec != b"avc1":
        # The first unit with a picture; parameters and messages (32 and above) come before it.
        types = (unit[0] >> 1 & 63 for unit in units(packet, length_bytes))
        return 16 <= next((kind for kind in types if kind < 32), 0) <= 21
    num_slices = 0
    for unit in units(packet, length_bytes):
        kind = unit[0] & 31
        if kind == KEY_SLICE:
            return True
        if kind == SLICE:
            # Two numbers of at most 31 bits each stand in these bytes.
            bits = Bits(unit[1:24])
            bits.number()  # first macroblock
            # I and SI; with 5 more, the same type for all slices of the picture.
            if bits.number() % 5 not in (2, 4):
                return False
            num_slices += 1
    return num_slices > 0


def unit_places(packet: bytes, length_bytes: int) -> Iterator[tuple[int, int]]:
    """Where each unit of a packet begins and ends: behind its length, or behind a start code with lengths of 0."""
    place = 0 if length_bytes else packet.find(b"\0\0\1") + 3
    while length_bytes and place + length_bytes < len(packet):
        start = place + length_bytes
        place = start + int.from_bytes(packet[place:start], "big")
        yield start, min(place, len(packet))
    while not length_bytes and place >= 3:
        start, place = place, packet.find(b"\0\0\1", place) + 3
        yield start, place - 3 if place >= 3 else len(packet)


def units(packet: bytes, length_bytes: int) -> Iterator[bytes]:
    """The units of a packet of H.264 or HEVC that are not empty."""
    return (packet[start:end] for start, end in unit_places(packet, length_bytes) if start < end)


class Bits:
    """Reads the first bits of a unit, without the bytes that keep start codes out of it."""

    def __init__(self, unit: bytes) -> None:
        content = unit.replace(b"\0\0\3", b"\0\0")
        self._left = 8 * len(content)
        self._value = int.from_bytes(content, "big")

    def take(self, count: int) -> int:
        """A number of so many bits; zeros behind the end."""
        self._left -= count
        return (self._value >> self._left if self._left >= 0 else 0) & ((1 << count) - 1)

    def number(self) -> int:
        """A number with as many zeros before it as it has bits."""
        zeros = 0
        while self._left > 0 and not self.take(1):
            zeros += 1
        # An Exp-Golomb code (H.264, 9.1). No valid one is longer, and a damaged one must not make a huge number.
        return (1 << zeros) - 1 + self.take(zeros) if zeros < 32 else 0
