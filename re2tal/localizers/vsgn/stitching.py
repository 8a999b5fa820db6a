"""Video self-stitching (VSGN, Zhao et al., ICCV 2021, section 3.2): a short clip beside a magnified copy of itself.

    n real steps of T        [clip, n | gap | the clip once more, stretched over the T - n - gap steps that are left]

What is short in the clip is long in the copy, and the graph joins the two. Actions are learnt in both; what is found in
the copy is mapped back.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from re2tal.structures import Features


class Layout(NamedTuple):
    """Where B clips lie on their grid of T steps."""

    num_real: Tensor
    """(B,) int64, steps of the clip itself"""
    first: Tensor
    """(B,) int64, first step of the copy; T where there is none"""
    zoom: Tensor
    """(B,) float32, steps of the copy per step of the clip; 1 where there is none"""

    @classmethod
    def of(cls, mask: Tensor, *, below: float | None, gap: int) -> Layout:
        """For clips with `mask` (B, T): those of at most `below` * T real steps get a copy, if that can be longer."""
        num_steps, num_real = mask.shape[1], mask.sum(dim=1)
        left = num_steps - num_real - gap
        short = (num_real > 0) & (num_real <= (below or 0) * num_steps) & (left > num_real)
        return cls(
            num_real=num_real,
            # T is behind every step, so that nothing counts as copied.
            first=torch.where(short, num_real + gap, num_steps),
            zoom=torch.where(short, left / num_real.clamp(min=1), 1.0).float(),
        )

    @classmethod
    def unpacked(cls, packed: Tensor, mask: Tensor) -> Layout:
        """The inverse of `packed`; `mask` (B, T) is that of the stitched clips."""
        first, zoom = packed[:, 0].long(), packed[:, 1]
        # The mask covers the copy too; the clip's own steps lie before it.
        before = torch.arange(mask.shape[1], device=mask.device) < first[:, None]
        return cls((mask & before).sum(dim=1), first, zoom)

    def packed(self) -> Tensor:
        """(B, 2) float32, which holds whole steps exactly."""
        return torch.stack([self.first.float(), self.zoom], dim=1)

    def in_copy(self, steps: Tensor) -> Tensor:
        """(N,) steps -> (B, N) bool."""
        return steps >= self.first[:, None]

    def to_copy(self, segments: Tensor, clip: int) -> Tensor:
        """(N, 2) in steps of one clip -> (N, 2), where its copy shows the same; as they are where there is none."""
        first, zoom = self.first[clip], self.zoom[clip]
        return segments * zoom + torch.where(zoom > 1, first, 0)

    def to_clip(self, segments: Tensor) -> Tensor:
        """(B, N, 2) in steps of the copies -> (B, N, 2) in those of the clips."""
        return (segments - self.first[:, None, None]) / self.zoom[:, None, None]

    def confined(self, segments: Tensor, copied: Tensor, *, num_steps: int) -> Tensor:
        """(B, N, 2) segments within the copy, where `copied` (B, N), else within the clip's real steps."""
        first = torch.where(copied, self.first[:, None], 0)
        last = torch.where(copied, num_steps - 1, (self.num_real - 1).clamp(min=0)[:, None])
        return segments.maximum(first[..., None].to(segments.dtype)).minimum(last[..., None].to(segments.dtype))


def stitch(features: Features, layout: Layout) -> Features:
    """Features (B, C, T) with their copies: linear in time, as one resamples a longer clip; zero in the gap."""
    values, mask = features
    num_steps = values.shape[-1]
    step = torch.arange(num_steps, device=values.device)
    copied = layout.in_copy(step)
    # Step t of the copy is the stretch [t, t + 1); its centre lies at (t + 1/2) / zoom of the clip.
    place = (step - layout.first[:, None] + 0.5) / layout.zoom[:, None] - 0.5
    last = (layout.num_real - 1).clamp(min=0)[:, None]
    place = place.clamp(min=0).minimum(last.to(place.dtype))
    before = place.long()
    share = (place - before)[:, None].to(values.dtype)
    left, right = (values.gather(2, at[:, None].expand_as(values)) for at in (before, (before + 1).minimum(last)))
    values = torch.where(copied[:, None], left + share * (right - left), values)
    return Features(values, mask | copied)
