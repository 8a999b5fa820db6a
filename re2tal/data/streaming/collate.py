"""Clips to batches."""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from re2tal.structures import Action, Timeline

B = TypeVar("B")


class Clip(NamedTuple):
    """What a batch says of one clip beside its content."""

    mask: Tensor
    """(T,) bool"""
    actions: tuple[Action, ...]
    timeline: Timeline
    video_id: str
    window_id: int
    valid: bool


def new_content(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Memory for the content of a batch, not filled yet; in a worker it is shared, so that handing it over copies
    nothing."""
    num_bytes = math.prod(shape) * dtype.itemsize
    if get_worker_info() is not None:
        storage = torch.UntypedStorage._new_shared(num_bytes)  # as torch's default_collate does
        return torch.empty(0, dtype=dtype).set_(storage).view(*shape)
    # All its pages at once: 10,000 page faults between resized frames take an eighth of the time that decoding does.
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_POPULATE", 0)
    return torch.frombuffer(mmap.mmap(-1, num_bytes, flags=flags), dtype=dtype).view(*shape)


def collate(kind: Callable[..., B], content: Tensor, clips: Sequence[Clip]) -> B:
    """A batch: frames (B, 3, T, H, W) uint8 RGB, cut to their final size but not normalised, or (B, C, T) float32."""
    masks, actions, timelines, video_ids, window_ids, valid = zip(*clips, strict=True)
    return kind(content, torch.stack(masks), actions, timelines, video_ids, window_ids, torch.tensor(valid))
