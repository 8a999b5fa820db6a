"""Frame numbers in H.264: each reference frame counts one up, so a number that is left out tells of lost packets.

Decoders invent what is missing and go on (H.264, 7.4.3, 8.2.5.2). Only the first bits of each packet are read.
"""

from __future__ import annotations

from collections.abc import Iterator

from re2tal.data.contract.key_frames import KEY_SLICE, SEQUENCE, SLICE, Bits, units

# Profiles whose headers also say the colour format (H.264, 7.3.2.1.1).
_HIGH_PROFILES = frozenset({44, 83, 86, 100, 110, 118, 122, 128, 134, 135, 138, 139, 244})
_INTRA = 2
"""A slice that needs no other picture, by its type modulo 5."""


class FrameNumbers:
    """Follows the packets of a stream in the order of decoding."""

    def __init__(self, extradata: bytes) -> None:
        self._length_bytes = length_bytes_of(extradata)
        self._bits: int | None = None
        """Of a frame number; None where they are not known, or numbers may be left out."""
        self._has_planes = False
        self._is_off = False
        self._previous: int | None = None
        self._is_after_intra = False
        for unit in parameter_sets(extradata):
            if unit[0] & 31 == SEQUENCE:
                self._read_sequence(unit)

    def lacks_frames(self, packet: bytes) -> bool:
        """Whether frames that others need are missing between this packet and the one before it."""
        for unit in units(packet, self._length_bytes):
            kind = unit[0] & 31
            if kind == SEQUENCE:
                self._read_sequence(unit)
            elif kind in (SLICE, KEY_SLICE):
                return self._is_gap(unit, is_reference=bool(unit[0] & 96), is_key=kind == KEY_SLICE)
        return False

    def _is_gap(self, unit: bytes, *, is_reference: bool, is_key: bool) -> bool:
        if self._bits is None or self._is_off:
            return False
        bits = Bits(unit[1:24])
        bits.number()  # first macroblock
        is_intra = bits.number() % 5 == _INTRA
        bits.number()  # parameters
        bits.take(2 * self._has_planes)
        number, before, may_restart = bits.take(self._bits), self._previous, self._is_after_intra
        if is_reference or before is None:
            self._previous, self._is_after_intra = number, is_intra
        if is_key or before is None:
            return False
        # An operation that empties the memory sets the count to 0; what comes after it needs that picture alone.
        return number not in (before, (before + 1) % (1 << self._bits), *((0, 1) if may_restart else ()))

    def _read_sequence(self, unit: bytes) -> None:
        bits = Bits(unit[1:64])
        profile = bits.take(8)
        # Constraints and level.
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
            # The standard allows no more; a damaged number must not take minutes.
            for _ in range(min(bits.number(), 255)):
                bits.number()
        bits.number()
        may_leave_out = bool(bits.take(1))
        # Numbers may be left out on purpose; a header that changes on the way, or says what no stream has, tells
        # nothing.
        if may_leave_out or num_bits > 16 or self._bits not in (None, num_bits):
            self._is_off = True
        self._bits, self._has_planes = num_bits, has_planes


def length_bytes_of(extradata: bytes) -> int:
    """Bytes of the length before each unit, by the header of an mp4 or Matroska file (ISO 14496-15, 5.3.3); 0 where
    start codes stand between units."""
    return (extradata[4] & 3) + 1 if len(extradata) > 6 and extradata[0] == 1 else 0


def parameter_sets(extradata: bytes) -> Iterator[bytes]:
    """The parameter sets in such a header."""
    if not length_bytes_of(extradata):
        yield from units(extradata, 0)
        return
    place = 5
    for mask in (31, 255):  # of sequences, then of pictures
        count, place = (extradata[place] & mask if place < len(extradata) else 0), place + 1
        for _ in range(count):
            start = place + 2
            place = start + int.from_bytes(extradata[place:start], "big")
            if unit := extradata[start:place]:
                yield unit
