"""Points of a feature pyramid: where they are, and what the prediction of each means.

A point at step t of the finest grid predicts the segment [t - left * stride, t + right * stride].
P counts the points of all levels, finest first; a row of `points` is (t, range low, range high, stride).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class PyramidOutputs(NamedTuple):
    """Predictions at the P points of all levels, finest level first."""

    logits: Tensor
    """(B, P, K)"""
    offsets: Tensor
    """(B, P, 2) distances to start and end, in strides of the point's level, not negative; or one pair per class,
    (B, P, K, 2)"""
    points: Tensor
    """(P, 4) float32: step, regression range low and high, stride"""
    mask: Tensor
    """(B, P) bool, True where the point is a real step"""
    step_logits: Tensor
    """(B, K, T) of the auxiliary classifier; empty without step supervision"""


def pyramid_points(
    num_steps: int, regression_ranges: Sequence[tuple[float, float]], *, device: torch.device | str | None = None
) -> Tensor:
    """The points of a pyramid over `num_steps` steps whose level l has stride 2**l: (P, 4) float32."""
    levels = []
    for level, (low, high) in enumerate(regression_ranges):
        stride = 2**level
        # Float32 holds whole steps exactly, up to 2**24.
        position = torch.arange(0, num_steps, stride, device=device, dtype=torch.float32)
        # Filled on the device: a copy of the numbers would wait for it.
        rest = [torch.full_like(position, value) for value in (low, high, stride)]
        levels.append(torch.stack([position, *rest], dim=1))
    return torch.cat(levels)


def decode(points: Tensor, offsets: Tensor) -> Tensor:
    """(P, 4) points and (..., P, 2) or (B, P, K, 2) offsets in strides -> starts and ends in steps, of that shape."""
    shape = (-1, 1) if offsets.ndim == 4 else (-1,)
    position, stride = points[:, 0].view(shape), points[:, 3].view(shape)
    left, right = offsets.unbind(-1)
    return torch.stack([position - left * stride, position + right * stride], dim=-1)
