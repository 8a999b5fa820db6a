"""What a decoder is."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor


class DecodeError(ValueError):
    """The bytes are not the video that they should be, or a frame of it cannot be decoded."""


class Decoder(Protocol):
    """Opens a video and gives frames by number."""

    def __call__(self, video: bytes, numbers: np.ndarray, *, at_once: int) -> Iterator[Tensor]:
        """The frames of ascending, different `numbers`, as (n, H, W, 3) uint8 RGB of at most `at_once` each.

        Raises:
            DecodeError: if the bytes cannot be opened as a video or one of these frames cannot be decoded.
            ValueError: if a number lies outside the video.
        """


def check_numbers(numbers: np.ndarray, num_frames: int) -> None:
    """ValueError for numbers outside a video."""
    if numbers[0] < 0 or numbers[-1] >= num_frames:
        raise ValueError(
            f"frames {numbers[0]} to {numbers[-1]} asked of a video with {num_frames} frames; "
            "if they come from an index, rebuild the shards: index and video disagree"
        )


def not_opened(video: bytes, error: Exception) -> DecodeError:
    """For bytes that are no video."""
    return DecodeError(f"{len(video)} bytes do not open as a video: {_reason(error)}")


def not_decoded(numbers: np.ndarray, error: Exception | str) -> DecodeError:
    """For frames that are damaged."""
    return DecodeError(f"a frame between {numbers[0]} and {numbers[-1]} cannot be decoded: {_reason(error)}")


def _reason(error: Exception | str) -> str:
    """The native message without its time stamps and source lines, cut short: it may end in the file's own bytes."""
    first_line = (str(error).splitlines() or [type(error).__name__])[0]
    return re.sub(r"\[[\d:]+\] \S+:\d+: ", "", first_line)[:200]
