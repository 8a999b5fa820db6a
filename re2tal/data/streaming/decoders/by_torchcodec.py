"""torchcodec from memory: an optional package, which needs FFmpeg's shared libraries.

It reads colours as the file names them. Files that `re2tal shards build` writes name decord's (BT.601, limited range).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch import Tensor

from re2tal.data.streaming.decoders.base import check_numbers, not_decoded, not_opened


def check() -> None:
    """ValueError where torchcodec is not there, or cannot be loaded."""
    try:
        # Not only whether it is installed: its libraries need FFmpeg's, which may be missing or of another version.
        import torchcodec.decoders  # noqa: F401
    except (ImportError, RuntimeError, OSError) as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"data.decoder is torchcodec, which cannot be loaded ({first_line}); pip install 're2tal[torchcodec]' and "
            "FFmpeg's shared libraries (apt install ffmpeg), or use --data.decoder decord"
        ) from None


def decode(video: bytes, numbers: np.ndarray, *, at_once: int) -> Iterator[Tensor]:
    """As `Decoder`."""
    from torchcodec.decoders import VideoDecoder

    try:
        # "exact" scans the file, so that numbers are ranks of display times.
        decoder = VideoDecoder(video, dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="exact")
        num_frames = len(decoder)
    except (RuntimeError, ValueError) as error:
        raise not_opened(video, error) from None
    check_numbers(numbers, num_frames)
    for start in range(0, len(numbers), at_once):
        some = numbers[start : start + at_once]
        try:
            frames = decoder.get_frames_at(some.tolist()).data
        except (RuntimeError, IndexError) as error:
            raise not_decoded(numbers, error) from None
        if len(frames) != len(some):
            raise not_decoded(numbers, f"{len(some)} frames asked, {len(frames)} decoded; the file is damaged")
        yield frames
