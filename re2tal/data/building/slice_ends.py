"""Slices of H.264 whose pictures are complete before their bytes are: what was decoded is not what was coded.

Arithmetic decoding (ITU-T H.264, 9.3) needs no other picture, so a second decoder is given each slice alone, with other
last bytes. A sound slice then fails: nine of ten at the first try, the others at one of many. A slice that was complete
before its last bytes does not fail, and is damaged. FFmpeg itself reports slices that need more bytes, and
damage of those that are coded without arithmetic.
"""

from __future__ import annotations

import random

import av

from re2tal.data.building.frame_numbers import length_bytes_of, parameter_sets
from re2tal.data.contract.key_frames import KEY_SLICE, PICTURE, SEQUENCE, SLICE, Bits, units

_LEAST_BYTES = 56
"""Of a slice: its header takes up to 24."""
_CUTS = (8, *(12, 16, 20, 10, 24, 14, 18, 32) * 5)
"""Bytes taken from the end, in turn; the first is replaced by nothing, the others by four of their own."""
# Seeded, so that the same file gives the same answer each time.
_OTHER = [b"", *(random.Random(number).randbytes(4) for number in range(1, len(_CUTS)))]
_FAILED = "error while decoding MB"


class SliceEnds:
    """Looks at packets of one stream."""

    def __init__(self, extradata: bytes) -> None:
        self._length_bytes = length_bytes_of(extradata)
        self._is_arithmetic: dict[int, bool] = {}
        """By the number of the picture parameters."""
        self._decoder = av.CodecContext.create("h264", "r")
        self._decoder.extradata, self._decoder.thread_count = extradata, 1
        # No concealment, which would hide the failure; no filter, as nobody looks at the picture.
        self._decoder.options = {"ec": "0", "skip_loop_filter": "all"}
        for unit in parameter_sets(extradata):
            self._read(unit)

    def are_unread(self, packet: bytes) -> bool:
        """Whether a slice of a packet was decoded without its last bytes."""
        sets = [unit for unit in units(packet, self._length_bytes) if unit[0] & 31 in (SEQUENCE, PICTURE)]
        for unit in sets:
            self._read(unit)
        before = b"".join(map(self._framed, sets))
        slices = (unit for unit in units(packet, self._length_bytes) if unit[0] & 31 in (SLICE, KEY_SLICE))
        return any(self._ignores_its_end(before, unit.rstrip(b"\0\3")) for unit in slices)

    def _ignores_its_end(self, before: bytes, unit: bytes) -> bool:
        bits = Bits(unit[1:24])
        bits.number()
        bits.number()
        if len(unit) < _LEAST_BYTES or not self._is_arithmetic.get(bits.number()):
            return False
        for cut, other in zip(_CUTS, _OTHER, strict=True):
            with av.logging.Capture() as messages:
                try:
                    self._decoder.decode(av.Packet(before + self._framed(unit[:-cut] + other)))
                except av.FFmpegError:
                    return False
            if any(_FAILED in text for _, _, text in messages):
                return False
        return True

    def _framed(self, unit: bytes) -> bytes:
        return (len(unit).to_bytes(self._length_bytes, "big") if self._length_bytes else b"\0\0\1") + unit

    def _read(self, unit: bytes) -> None:
        """Note how the pictures of a parameter set are coded (7.3.2.2)."""
        if unit[0] & 31 == PICTURE:
            bits = Bits(unit[1:16])
            number = bits.number()
            bits.number()
            self._is_arithmetic[number] = bool(bits.take(1))
