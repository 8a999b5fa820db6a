"""Prepares frames for a network. A rewired one saves only the uint8 frames and prepares them again in backward.

uint8 -> colours, drawn once -> normalised, in the weights' type: two or four times the bytes
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from re2tal.data.streaming.transforms import draw_colours, recolour
from re2tal.reversible.recompute import recomputable_from


def prepare_frames(frames: Tensor, *, strength: float, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """(B, 3, T, H, W) uint8 -> the same shape in `dtype`, colours changed (`draw_colours`) and normalised.

    The result has a `Recipe` that uses `frames`, as long as the caller holds them: nobody may write to them until
    backward has ended.
    """
    matrix, bias = draw_colours(frames, strength=strength, generator=generator)
    prepare = partial(recolour, matrix=matrix, bias=bias, dtype=dtype)
    return recomputable_from(prepare(frames), [frames], prepare)
