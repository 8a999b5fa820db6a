"""Frames by number from a video held in memory, by the decoder that `data.decoder` names."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from re2tal.data.streaming.decoders import by_decord, by_pyav, by_torchcodec, default
from re2tal.data.streaming.decoders.base import DecodeError, Decoder
from re2tal.data.streaming.decoders.default import count_frames

__all__ = ["DECODERS", "DecodeError", "DecoderName", "check_decoder", "count_frames", "decode_frames", "decode_parts"]

DecoderName = Literal["decord", "pyav", "torchcodec"]

DECODERS: dict[DecoderName, Decoder] = {
    "decord": default.decode,
    "pyav": by_pyav.decode,
    "torchcodec": by_torchcodec.decode,
}

_BYTES_AT_ONCE = 4 << 20  # pictures that a cache still holds when they are resized, in memory that is used again


def check_decoder(name: DecoderName) -> None:
    """ValueError for an unknown decoder, or one that cannot be loaded."""
    if name not in DECODERS:
        raise ValueError(f"data.decoder is {name!r}; known: {', '.join(DECODERS)}")
    if name == "torchcodec":
        by_torchcodec.check()
    if name == "decord" and by_decord.decord is None:
        _say_pyav_decodes()


# Once a process, not once a stream.
@cache
def _say_pyav_decodes() -> None:
    print(
        "decord is not installed, as it has no package for this machine: PyAV decodes the same pictures, more slowly "
        "(--data.decoder torchcodec is faster, where torchcodec is installed)",
        file=sys.stderr,
    )


def decode_parts(
    video: bytes, numbers: np.ndarray, *, frame_bytes: int, decoder: DecoderName = "decord"
) -> Iterator[Tensor]:
    """The frames of ascending, different `numbers`, a few megabytes (n, H, W, 3) uint8 RGB at a time.

    Raises:
        DecodeError: if the bytes cannot be opened as a video or one of these frames cannot be decoded.
        ValueError: if a number lies outside the video.
    """
    return DECODERS[decoder](video, numbers, at_once=max(1, _BYTES_AT_ONCE // frame_bytes))


def decode_frames(
    video_bytes: bytes, indices: Sequence[int] | np.ndarray, *, decoder: DecoderName = "decord"
) -> Tensor:
    """The frames at `indices` (any order, repeats allowed) as (n, H, W, 3) uint8 RGB. Raises as `decode_parts`."""
    wanted = np.asarray(indices, dtype=np.int64)
    if wanted.ndim != 1 or len(wanted) == 0:
        raise ValueError(f"decode_frames needs a flat, non-empty list of frame numbers, got shape {wanted.shape}")
    # Decoders take ascending, different numbers: to go back would mean to seek.
    unique, back = np.unique(wanted, return_inverse=True)
    (frames,) = DECODERS[decoder](video_bytes, unique, at_once=len(unique))
    return frames if len(unique) == len(wanted) and np.all(back[1:] > back[:-1]) else frames[torch.from_numpy(back)]
