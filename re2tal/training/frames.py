"""Frames as a network takes them, which a rewired one need not keep: backward prepares the uint8 ones again.

uint8 -> colours, drawn once -> normalised, in the weights' type: two or four times the bytes
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from re2tal.data.streaming.transforms import draw_colours, recolour
from re2tal.reversible.recompute import with_origin


def prepare_frames(frames: Tensor, *, strength: float, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """(B, 3, T, H, W) uint8 -> the same shape in `dtype`, colours changed (`draw_colours`) and normalised.

    `frames` are the `Origin` of what is returned, if somebody holds them until the forward: nobody may write to them
    until backward has ended.
    """
    matrix, bias = draw_colours(frames, strength=strength, generator=generator)
    prepare = partial(recolour, matrix=matrix, bias=bias, dtype=dtype)
    return with_origin(prepare(frames), [frames], prepare)
