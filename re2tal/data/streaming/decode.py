"""Frames by number from a video held in memory: the one module that imports decord.

decord is exact on the files that `re2tal shards build` writes (H.264, closed groups of pictures, constant rate, no edit
list) and only on such files; on others it may return wrong frames, or never return. Give it nothing else.

A live reader keeps decoding ahead without a limit (gigabytes within seconds), so no reader outlives the call that
opened it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from io import BytesIO

import decord
import numpy as np
import torch
from torch import Tensor

decord.logging.set_level(decord.logging.QUIET)  # every failure raises; FFmpeg's own lines would only drown it


class DecodeError(ValueError):
    """The bytes are not the video that they should be, or a frame of it cannot be decoded."""


def count_frames(video_bytes: bytes) -> int:
    """How many frames decord sees in the file.

    Raises:
        DecodeError: if the bytes cannot be opened as a video.
    """
    return len(_open(video_bytes))


def decode_frames(video_bytes: bytes, indices: Sequence[int] | np.ndarray) -> Tensor:
    """The frames at `indices` (any order, repeats allowed) as (n, H, W, 3) uint8 RGB.

    Raises:
        DecodeError: if the bytes cannot be opened as a video or one of these frames cannot be decoded.
        ValueError: if an index lies outside the video.
    """
    wanted = np.asarray(indices, dtype=np.int64)
    if wanted.ndim != 1 or len(wanted) == 0:
        raise ValueError(f"decode_frames needs a flat, non-empty list of frame numbers, got shape {wanted.shape}")
    unique, back = np.unique(wanted, return_inverse=True)
    reader = _open(video_bytes)
    if unique[0] < 0 or unique[-1] >= len(reader):
        raise ValueError(
            f"frames {unique[0]} to {unique[-1]} asked of a video with {len(reader)} frames; "
            "if they come from an index, rebuild the shards: index and video disagree"
        )
    try:
        frames = torch.utils.dlpack.from_dlpack(reader.get_batch(unique).to_dlpack())
    except (decord.DECORDError, decord.DECORDLimitReachedError, RuntimeError) as error:
        raise DecodeError(f"a frame between {unique[0]} and {unique[-1]} cannot be decoded: {_reason(error)}") from None
    if len(frames) != len(unique):
        raise DecodeError(f"{len(unique)} frames asked, {len(frames)} decoded; the file is damaged")
    return frames if len(unique) == len(wanted) and np.all(back[1:] > back[:-1]) else frames[torch.from_numpy(back)]


def _open(video_bytes: bytes) -> decord.VideoReader:
    try:
        # fault_tol=1 is the tightest setting (0 and -1 switch the check off): it raises where decord would
        # otherwise repeat frames in silence, or retry for ever.
        return decord.VideoReader(BytesIO(video_bytes), ctx=decord.cpu(0), num_threads=1, fault_tol=1)
    except (decord.DECORDError, RuntimeError) as error:
        raise DecodeError(f"{len(video_bytes)} bytes do not open as a video: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    """The native message without its time stamps and source lines, cut short: it may end in the file's own bytes."""
    first_line = (str(error).splitlines() or [type(error).__name__])[0]
    return re.sub(r"\[[\d:]+\] \S+:\d+: ", "", first_line)[:200]
