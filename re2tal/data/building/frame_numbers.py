"""Frame numbers in H.264: each reference frame counts one up, so a number that is left out tells of lost packets.

Decoders invent what is missing and go on (H.264, 7.4.3, 8.2.5.2). Only the first bits of each packet are read.
"""

from __future__ import annotations

from collections.abc import Iterator

from re2tal.data.contract.key_frames import KEY_SLICE, SLICE, Bits, with_lengths

_HIGH_PROFILES = frozenset({44, 83, 86, 100, 110, 118, 122, 128, 134, 135, 138, 139, 244})
_SEQUENCE = 7


class FrameNumbers:
    """Follows the packets of a stream in the order of decoding."""

    def __init__(self, extradata: bytes) -> None:
        self._length_bytes = (extradata[4] & 3) + 1 if len(extradata) > 6 and extradata[0] == 1 else 0
        self._bits: int | None = None
        """Of a frame number; None where they are not known, or numbers may be left out."""
        self._has_planes = False
        self._is_off = False
        self._previous: int | None = None
        sets = _sets_of(extradata) if self._length_bytes else _between_start_codes(extradata)
        for unit in sets:
            self._read_sequence(unit)

    def lacks_frames(self, packet: bytes) -> bool:
        """Whether frames that others need are missing between this packet and the one before it."""
        units = with_lengths(packet, self._length_bytes) if self._length_bytes else _between_start_codes(packet)
        for unit in units:
            kind = unit[0] & 31
            if kind == _SEQUENCE:
                self._read_sequence(unit)
            elif kind in (SLICE, KEY_SLICE):
                return self._is_gap(unit, is_reference=bool(unit[0] & 96), is_key=kind == KEY_SLICE)
        return False

    def _is_gap(self, unit: bytes, *, is_reference: bool, is_key: bool) -> bool:
        if self._bits is None or self._is_off:
            return False
        bits = Bits(unit[1:24])
        for _ in range(3):  # first macroblock, type, parameters
            bits.number()
        bits.take(2 * self._has_planes)
        number, before = bits.take(self._bits), self._previous
        if is_reference or before is None:
            self._previous = number
        if is_key or before is None:
            return False
        # An operation that empties the memory sets the count to 0.
        return number not in (before, (before + 1) % (1 << self._bits), 0, 1)

    def _read_sequence(self, unit: bytes) -> None:
        bits = Bits(unit[1:64])
        profile = bits.take(8)
        bits.take(16)
        bits.number()
        has_planes = False
        if profile in _HIGH_PROFILES:
            has_planes = bits.number() == 3 and bool(bits.take(1))
            bits.number()
            bits.number()
            bits.take(1)
            if bits.take(1):  # scaling lists are long, and rare
                self._is_off = True
                return
        num_bits = bits.number() + 4
        order = bits.number()
        if order == 0:
            bits.number()
        elif order == 1:
            bits.take(1)
            bits.number()
            bits.number()
            for _ in range(min(bits.number(), 255)):
                bits.number()
        bits.number()
        may_leave_out = bool(bits.take(1))
        if may_leave_out or num_bits > 16 or self._bits not in (None, num_bits):
            self._is_off = True
        self._bits, self._has_planes = num_bits, has_planes


def _sets_of(extradata: bytes) -> Iterator[bytes]:
    """The sequence parameters in the header of an mp4 or Matroska file."""
    place = 6
    for _ in range(extradata[5] & 31):
        size = int.from_bytes(extradata[place : place + 2], "big")
        if unit := extradata[place + 2 : place + 2 + size]:
            yield unit
        place += 2 + size


def _between_start_codes(packet: bytes) -> Iterator[bytes]:
    place = packet.find(b"\0\0\1")
    while place >= 0:
        if unit := packet[place + 3 : place + 67]:
            yield unit
        place = packet.find(b"\0\0\1", place + 3)
