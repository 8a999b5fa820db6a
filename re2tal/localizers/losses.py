"""The two losses of an anchor-free localizer, element by element, in float32 or better, and what they are divided by.

focal (Lin et al., ICCV 2017):  a_t (1 - p_t)^2 (-log p_t)
DIoU (Zheng et al., AAAI 2020): 1 - IoU + (distance of centres / length of the enclosing segment)^2
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Two segments without length have neither union nor span: dividing by 0 would give NaN, and its gradient too.
SMALLEST_LENGTH = 1e-8


def sigmoid_focal_loss(logits: Tensor, targets: Tensor, *, alpha: float = 0.25) -> Tensor:
    """Focal loss of each logit; targets of the same shape lie in [0, 1] and may be smoothed."""
    logits, targets = _at_least_float32(logits), _at_least_float32(targets)
    probability = logits.sigmoid()
    # 1 - p_t, written so that smoothed targets lie between the two cases.
    mistake = probability * (1 - targets) + (1 - probability) * targets
    # 0.25 and the square are those of Lin et al., which all public implementations keep.
    weight = alpha * targets + (1 - alpha) * (1 - targets)
    return weight * mistake**2 * F.binary_cross_entropy_with_logits(logits, targets, reduction="none")


def focal_of_chosen(logits: Tensor, targets: Tensor, chosen: Tensor, *, alpha: float = 0.25) -> Tensor:
    """`sigmoid_focal_loss` where the bool mask `chosen`, which broadcasts to the logits, is True; 0 elsewhere.

    What stands elsewhere, NaN included, reaches neither the loss nor its gradient. Nothing waits for the device.
    """
    # Chosen before and after: a loss that is set to 0 only afterwards still has the gradient 0 * NaN.
    losses = sigmoid_focal_loss(torch.where(chosen, logits, 0.0), targets, alpha=alpha)
    return torch.where(chosen, losses, 0.0)


def iou_of_offsets(offsets: Tensor, targets: Tensor) -> Tensor:
    """IoU of pairs of segments that share a point; shapes as `diou_loss`."""
    return _iou(*_at_least_float32(offsets).unbind(-1), *_at_least_float32(targets).unbind(-1))


def diou_loss(offsets: Tensor, targets: Tensor) -> Tensor:
    """DIoU loss of N pairs of segments that share a point: (N, 2) distances to start and end, twice -> (N,).

    Distances are not negative, so both segments contain the point and overlap at least there.
    """
    (left, right), (true_left, true_right) = (_at_least_float32(x).unbind(-1) for x in (offsets, targets))
    iou = _iou(left, right, true_left, true_right)
    enclosing = torch.maximum(left, true_left) + torch.maximum(right, true_right)
    # Both are measured from the same point, whose place cancels out.
    centre_distance = 0.5 * (right - left - true_right + true_left)
    return 1 - iou + (centre_distance / enclosing.clamp(min=SMALLEST_LENGTH)) ** 2


def _iou(left: Tensor, right: Tensor, true_left: Tensor, true_right: Tensor) -> Tensor:
    intersection = torch.minimum(left, true_left) + torch.minimum(right, true_right)
    union = left + right + true_left + true_right - intersection
    return intersection / union.clamp(min=SMALLEST_LENGTH)


class RunningCount(nn.Module):
    """An exponential mean of a count, kept in a buffer.

    The batches of an optimizer step, of all ranks and one after the other, have an order. With m the mean before the
    step, batch number n of it is divided by

        momentum * m + (1 - momentum) * (c[0] + ... + c[n]) / (n + 1)

    and the mean after the step is that of its last batch. So neither losses nor mean depend on how the batches of a
    step are split over ranks and accumulation, and a step of one batch has the exponential mean of the published code.

    It is stored in whole millionths (2**-20), because `model.bfloat16()` rounds every floating buffer to 8 bits, and a
    mean of 100 would then no longer move.
    """

    UNITS = 2**20
    units: Tensor

    def __init__(self, initial: float, *, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("units", torch.tensor(round(initial * self.UNITS), dtype=torch.int64))
        # Replaced where several ranks train (runs/training_data), so that a localizer needs no process group.
        self.of_all_ranks: Callable[[Tensor], tuple[Tensor, int]] = _of_one_rank
        """A scalar of each rank -> those of all ranks (R,), and the number of this one; a collective."""
        self._step: tuple[Tensor, list[Tensor]] | None = None

    def begin_step(self) -> None:
        """The counts from here on are of one optimizer step. Never called: each count is a step of its own."""
        # A copy: `update` writes to the buffer, and all batches of a step start from the mean before it.
        self._step = (self.units.clone(), [])

    def value(self) -> Tensor:
        """The mean, a float32 scalar."""
        return (self.units.double() / self.UNITS).float()

    def update(self, count: Tensor) -> Tensor:
        """Mix a new count in; the mean up to and with it, a float32 scalar. Every rank calls this."""
        before, counts = self._step or (self.units.clone(), [])
        # The ranks' batches that run at the same time are counted in the order of ranks.
        here, rank = self.of_all_ranks(count.double())
        own = self._mixed(before, torch.cat([*counts, here[: rank + 1]]))
        counts.append(here)
        # The same on all ranks, unlike `own`, so that their buffers never differ.
        self.units.copy_(self._mixed(before, torch.cat(counts)))
        return (own.double() / self.UNITS).float()

    def _mixed(self, before: Tensor, counts: Tensor) -> Tensor:
        mean = self.momentum * before.double() + (1 - self.momentum) * self.UNITS * counts.mean()
        return mean.round().to(torch.int64)


def _of_one_rank(count: Tensor) -> tuple[Tensor, int]:
    return count.reshape(1), 0


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
