"""Anchors of a feature pyramid: where they are, which action each must predict, and what its prediction means.

An anchor (start, end) in steps covers its two end steps, so its length is end - start + 1. A counts the anchors of all
levels: finest level first, then by position, then by scale.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Weights of the box coder that the public implementations took from object detection; without them, published weights
# decode wrongly.
CENTRE_WEIGHT, LENGTH_WEIGHT = 10.0, 5.0
# A predicted length is at most 62.5 times its anchor's, so that exp() stays finite.
LARGEST_LENGTH_LOG = math.log(1000 / 16)


def pyramid_anchors(
    num_steps: int, strides: Sequence[int], scales: Sequence[float], *, device: torch.device | str | None = None
) -> Tensor:
    """The anchors of a pyramid over `num_steps` steps, each `scale * stride` long: (A, 2) float32."""
    levels = []
    for stride in strides:
        centre = torch.arange(0, num_steps, stride, dtype=torch.float32, device=device)[:, None] + stride / 2
        # Filled on the device: a copy of the numbers would wait for it.
        # A step is lost at the ends, as an anchor covers both of its end steps.
        half = torch.cat([torch.full_like(centre[:1, 0], (scale * stride - 1) / 2) for scale in scales])
        levels.append(torch.stack([centre - half, centre + half], dim=-1).flatten(0, 1))
    return torch.cat(levels)


def decode(anchors: Tensor, offsets: Tensor) -> Tensor:
    """(A, 2) anchors and (B, A, 2) shifts and log stretches -> (B, A, 2) starts and ends in steps."""
    anchors = anchors.to(offsets.dtype)
    length = anchors[:, 1] - anchors[:, 0] + 1
    centre = anchors.mean(dim=1) + offsets[..., 0] / CENTRE_WEIGHT * length
    half = ((offsets[..., 1] / LENGTH_WEIGHT).clamp(max=LARGEST_LENGTH_LOG).exp() * length - 1) / 2
    return torch.stack([centre - half, centre + half], dim=-1)


class AnchorTargets(NamedTuple):
    """What each of A segments must predict for one clip."""

    labels: Tensor
    """(A,) int64; 0 is background, 1 + class otherwise"""
    segments: Tensor
    """(A, 2) the action it is matched with; means something only where the label is not 0"""


@torch.no_grad()
def match(segments: Tensor, actions: Tensor, labels: Tensor, *, min_iou: float) -> AnchorTargets:
    """Each segment with the action it overlaps most, if by `min_iou`; besides, each action with its best segments.

    `segments` (A, 2), `actions` (N, 2), both in steps; `labels` (N,) int64 classes. Segments are a step longer than
    end - start, actions are not, as in the public implementations.
    """
    if len(actions) == 0:
        return AnchorTargets(
            torch.zeros(len(segments), dtype=torch.int64, device=segments.device), torch.zeros_like(segments)
        )
    overlap = torch.minimum(segments[:, None, 1], actions[:, 1]) - torch.maximum(segments[:, None, 0], actions[:, 0])
    overlap = overlap.clamp(min=0)
    lengths = segments[:, None, 1] - segments[:, None, 0] + 1
    iou = overlap / (lengths + actions[:, 1] - actions[:, 0] - overlap).clamp(min=0)
    best_iou, best = iou.max(dim=1)
    # > 0, or an action that no segment overlaps would match all of them: each has its best IoU, 0.
    best_for_an_action = ((iou == iou.amax(dim=0)) & (iou > 0)).any(dim=1)
    matched = (best_iou >= min_iou) | best_for_an_action
    return AnchorTargets(torch.where(matched, labels[best] + 1, 0), actions[best])


def giou_loss(segments: Tensor, targets: Tensor) -> Tensor:
    """1 - generalised IoU (Rezatofighi et al., CVPR 2019) of N pairs: (N, 2) starts and ends, twice -> (N,)."""
    # Boundaries that were moved may have crossed.
    start, end = segments.amin(dim=-1), segments.amax(dim=-1)
    true_start, true_end = targets.unbind(-1)
    overlap = (torch.minimum(end, true_end) - torch.maximum(start, true_start)).clamp(min=0)
    # 1e-7 in both, so that two empty segments in one place are 0 / 1e-7, and not NaN.
    enclosing = torch.maximum(end, true_end) - torch.minimum(start, true_start) + 1e-7
    union = (end - start) + (true_end - true_start) - overlap + 1e-7
    return 1 - overlap / union + (enclosing - union) / enclosing


@torch.no_grad()
def evaluation_targets(actions: Tensor, num_steps: int) -> Tensor:
    """Where actions start, end and go on, for one clip: (N, 2) in steps -> (3, num_steps) bool.

    A step counts as a start if all of it lies within 1.5 steps of one, so do ends; it is inside an action if all of it
    is. (BSN, Lin et al., ECCV 2018, asks for more than half; OpenTAD truncates the covered share to a whole number.)
    """
    step = torch.arange(num_steps, device=actions.device)
    # Three steps wide, as in BSN.
    around = torch.stack([actions - 1.5, actions + 1.5], dim=-1)
    regions = torch.stack([around[:, 0], around[:, 1], actions])
    covered = torch.minimum(regions[..., 1, None], step + 1) - torch.maximum(regions[..., 0, None], step)
    return (covered >= 1).any(dim=1)


def balanced_bce(logits: Tensor, targets: Tensor, mask: Tensor | None = None, *, epsilon: float = 0.0) -> Tensor:
    """Binary cross-entropy in which the positives and the negatives, however many, weigh the same; a scalar.

    Only where `mask`, of the shape of the logits, is True; None is everywhere. Taken of the probabilities, as in the
    public implementations: a step that is wrong beyond what float32 can say costs 100 and teaches nothing. `epsilon`
    is added to probabilities before their logarithm (the original VSGN: 1e-5).
    """
    mask = torch.ones_like(targets) if mask is None else mask
    targets, count = targets & mask, mask.sum().clamp(min=1)
    logits = torch.where(mask, logits, 0.0)
    if epsilon:
        loss = -(torch.where(targets, logits, -logits).sigmoid() + epsilon).log()
    else:
        # PyTorch cuts each logarithm off at -100.
        loss = F.binary_cross_entropy(logits.sigmoid(), targets.to(logits.dtype), reduction="none")
    positive = targets.sum().to(logits.dtype) / count
    weights = torch.where(targets, 0.5 / positive, torch.where(mask, 0.5 / (1 - positive), 0.0))
    # One of the weights would be infinite.
    one_sided = (positive == 0) | (positive == 1)
    return torch.where(mask, torch.where(one_sided, loss, weights * loss), 0.0).sum() / count
