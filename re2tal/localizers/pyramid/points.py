"""Points of a feature pyramid: where they are, which action each must predict, and what its prediction means.

A point at step t of the finest grid predicts the segment [t - left * stride, t + right * stride].
P counts the points of all levels, finest first; a row of `points` is (t, range low, range high, stride).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

SIMILAR_LENGTH_STEPS = 1e-3


def pyramid_points(
    num_steps: int, regression_ranges: Sequence[tuple[float, float]], *, device: torch.device | str | None = None
) -> Tensor:
    """The points of a pyramid over `num_steps` steps whose level l has stride 2**l: (P, 4) float32."""
    levels = []
    for level, (low, high) in enumerate(regression_ranges):
        stride = 2**level
        position = torch.arange(0, num_steps, stride, device=device, dtype=torch.float32)
        rest = torch.tensor([low, high, stride], device=device, dtype=torch.float32)
        levels.append(torch.cat([position[:, None], rest.expand(len(position), 3)], dim=1))
    return torch.cat(levels)


def decode(points: Tensor, offsets: Tensor) -> Tensor:
    """(P, 4) points and (..., P, 2) offsets in strides -> (..., P, 2) starts and ends in steps."""
    position, stride = points[:, 0], points[:, 3]
    left, right = offsets.unbind(-1)
    return torch.stack([position - left * stride, position + right * stride], dim=-1)


@torch.no_grad()
def assign_targets(
    points: Tensor, segments: Tensor, labels: Tensor, *, num_classes: int, centre_radius: float
) -> tuple[Tensor, Tensor]:
    """What each point must predict for one clip (ActionFormer, section 3.3).

    A point is positive for an action if it lies strictly inside it, within `centre_radius` strides of its centre, and
    its larger distance to the two ends lies in the point's regression range. Both ends of the range count, as in the
    two public implementations: a distance of exactly 4 belongs to two levels. Of several actions the shortest is
    regressed; those of the same length to 1e-3 steps all count as classes (one movement under two labels).

    `points` (P, 4); `segments` (N, 2) in steps; `labels` (N,) int64. Returns classes (P, K) of zeros and ones, and
    distances to start and end in strides (P, 2), which mean something only where a class is one.
    """
    if len(segments) == 0:
        return points.new_zeros(len(points), num_classes), points.new_zeros(len(points), 2)
    position, low, high, stride = (column[:, None] for column in points.unbind(1))
    start, end = segments.unbind(1)
    distances = torch.stack([position - start, end - position], dim=-1)
    centre, radius = 0.5 * (start + end), centre_radius * stride
    near_centre = (position > torch.maximum(centre - radius, start)) & (position < torch.minimum(centre + radius, end))
    reach = distances.amax(dim=-1)
    candidate = near_centre & (reach >= low) & (reach <= high)

    lengths = torch.where(candidate, end - start, torch.inf)
    shortest, choice = lengths.min(dim=1)
    similar = candidate & (lengths <= shortest[:, None] + SIMILAR_LENGTH_STEPS)
    one_hot = torch.nn.functional.one_hot(labels, num_classes).to(points.dtype)
    classes = (similar.to(points.dtype) @ one_hot).clamp(max=1.0)
    return classes, distances[torch.arange(len(points), device=points.device), choice] / stride
