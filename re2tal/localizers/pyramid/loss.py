"""How wrong the predictions of a pyramid's points are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from re2tal.localizers.losses import SMALLEST_LENGTH, RunningCount, diou_loss, iou_of_offsets, sigmoid_focal_loss
from re2tal.localizers.pyramid.assignment import Targets
from re2tal.localizers.pyramid.points import PyramidOutputs


@dataclass(frozen=True)
class PointLoss:
    """Focal loss of all real points and DIoU loss of the positive ones, each divided by a count of positive points.

    Where each class has offsets of its own, the DIoU loss is summed over the classes that a point must predict. In
    training that count is a running mean, in evaluation the batch's own.
    """

    label_smoothing: float
    """Share of each class target that is spread evenly over the classes and background"""
    regression_weight: float
    """Of the DIoU loss"""
    stored_count: bool = False
    """Divide the focal loss by the running mean in evaluation too, as OpenTAD's TemporalMaxer and TriDet do"""
    iou_power: float = 0.0
    """The focal loss of a class that a point must predict is multiplied by this power of its segment's IoU"""

    def __call__(
        self, outputs: PyramidOutputs, targets: Targets, *, positives: RunningCount, training: bool
    ) -> dict[str, Tensor]:
        """ "classification" and "regression", weighted. `targets` are of the batch, (B, P, ...). In training it updates
        `positives`."""
        positive = (targets.classes.sum(dim=-1) > 0) & outputs.mask
        num_positive = positive.sum().clamp(min=1)
        divisor = positives.update(num_positive) if training else num_positive
        weights = torch.where(positive, targets.weights, 1.0)

        smoothing, num_classes = self.label_smoothing, targets.classes.shape[-1]
        classes = targets.classes * (1 - smoothing) + smoothing / (num_classes + 1)
        focal = sigmoid_focal_loss(outputs.logits[outputs.mask], classes[outputs.mask])
        if self.iou_power:
            hot = (targets.classes > 0) & outputs.mask[..., None]
            predicted, where = _chosen(outputs.offsets, hot)
            # The power's slope is infinite at 0.
            iou = iou_of_offsets(predicted, targets.offsets[where]).clamp(min=SMALLEST_LENGTH) ** self.iou_power
            focal = focal * torch.ones_like(focal).masked_scatter(hot[outputs.mask], iou.to(focal.dtype))
        if outputs.offsets.ndim == 4:
            positive = (targets.classes > 0) & outputs.mask[..., None]
        predicted, where = _chosen(outputs.offsets, positive)
        classification = (focal * weights[outputs.mask][:, None]).sum()
        diou = diou_loss(predicted, targets.offsets[where]) * weights[where]
        return {
            "classification": classification / (positives.value() if self.stored_count and not training else divisor),
            "regression": self.regression_weight * diou.sum() / divisor,
        }


def _chosen(offsets: Tensor, chosen: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The N offsets (N, 2) that the mask (B, P) or (B, P, K) chooses, and the clip and point of each, N numbers each.

    Offsets that all classes share are chosen once for each of a point's classes.
    """
    indices = chosen.nonzero(as_tuple=True)
    return offsets[indices[: offsets.ndim - 1]], indices[:2]
