"""decord, or PyAV where decord is not published: the same pictures, so no configuration has to name the machine."""

from __future__ import annotations

from re2tal.data.streaming.decoders import by_decord, by_pyav

_DECODER = by_pyav if by_decord.decord is None else by_decord
count_frames, decode, pictures = _DECODER.count_frames, _DECODER.decode, _DECODER.pictures
