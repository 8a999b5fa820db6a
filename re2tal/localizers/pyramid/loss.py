"""How wrong the predictions of a pyramid's points are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from re2tal.localizers.losses import SMALLEST_LENGTH, RunningCount, diou_loss, focal_of_chosen, iou_of_offsets
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
        # A batch without any action has a loss too, that of the background.
        num_positive = positive.sum().clamp(min=1)
        # Every rank comes here once for each batch: `update` is a collective.
        divisor = positives.update(num_positive) if training else num_positive
        weights = torch.where(positive, targets.weights, 1.0)

        smoothing, num_classes = self.label_smoothing, targets.classes.shape[-1]
        classes = targets.classes * (1 - smoothing) + smoothing / (num_classes + 1)
        focal = focal_of_chosen(outputs.logits, classes, outputs.mask[..., None])
        hot = (targets.classes > 0) & outputs.mask[..., None]
        # Where classes have offsets of their own, only those of the classes that are there are learnt.
        learns = hot if outputs.offsets.ndim == 4 else positive
        predicted, wanted = _chosen(outputs.offsets, targets.offsets, learns)
        if self.iou_power:
            # The power's slope is infinite at 0.
            iou = iou_of_offsets(predicted, wanted).clamp(min=SMALLEST_LENGTH) ** self.iou_power
            focal = focal * torch.where(hot, iou if iou.ndim == 3 else iou[..., None], 1.0)
        classification = (focal * weights[..., None]).sum()
        diou = diou_loss(predicted, wanted) * (weights[..., None] if learns.ndim == 3 else weights)
        return {
            "classification": classification / (positives.value() if self.stored_count and not training else divisor),
            "regression": self.regression_weight * torch.where(learns, diou, 0.0).sum() / divisor,
        }


def _chosen(offsets: Tensor, targets: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Offsets (B, P, 2) or (B, P, K, 2) and their targets (B, P, 2), both of the shape of the offsets.

    Where the mask (B, P) or (B, P, K) is False, both are of the same segment: nothing that stands there, NaN included,
    reaches a loss or a gradient, and nothing waits for the device, as choosing by index would.
    """
    targets = (targets[:, :, None] if offsets.ndim == 4 else targets).expand_as(offsets)
    return torch.where(chosen[..., None], offsets, 1.0), torch.where(chosen[..., None], targets, 1.0)
