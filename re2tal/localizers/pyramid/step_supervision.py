"""An auxiliary loss: a linear layer on the input features names the actions under way at every step.

A pyramid, its norms and its heads lie between a localizer's losses and the backbone, and at random weights they
scramble the gradient: a backbone that also starts from random weights may take very long to find out what moves. One
linear layer scrambles nothing. It is used in training only.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def step_targets(segments: Tensor, labels: Tensor, *, num_steps: int, num_classes: int) -> Tensor:
    """(N, 2) segments in steps, (N,) int64 labels -> (K, T), one where such an action covers the step's middle."""
    # Step t is the stretch [t, t + 1).
    middle = torch.arange(num_steps, device=segments.device) + 0.5
    covered = (segments[:, :1] <= middle) & (middle < segments[:, 1:])
    targets = segments.new_zeros(num_classes, num_steps)
    # Several actions of one class may be under way at once.
    return targets.index_add_(0, labels, covered.to(targets.dtype)).clamp_(max=1)


def step_loss(logits: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    """Binary cross entropy of (B, K, T) logits, summed over classes, mean over the steps where (B, T) mask is True."""
    # Before the loss and after it, so that no NaN of the padding reaches a gradient.
    logits = torch.where(mask[:, None], logits.float(), 0.0)
    losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(dim=1)
    return torch.where(mask, losses, 0.0).sum() / mask.sum().clamp(min=1)
