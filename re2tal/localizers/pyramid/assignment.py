"""Which action each point of a pyramid must predict.

An assigner is called for one clip with its points (P, 4), its actions as segments (N, 2) in steps and labels (N,)
int64, and what the localizer predicts: logits (P, K), offsets (P, 2) or (P, K, 2) in strides, and the mask (P,) of real
points.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from re2tal.localizers.losses import diou_loss, sigmoid_focal_loss

# As in ActionFormer and OpenTAD.
SIMILAR_LENGTH_STEPS = 1e-3


class Targets(NamedTuple):
    """What the P points of one clip must predict."""

    classes: Tensor
    """(P, K) zeros and ones; a point with any one is positive"""
    offsets: Tensor
    """(P, 2) distances to start and end in strides; they mean something only at positive points"""
    weights: Tensor
    """(P,) how much a positive point counts in the losses; the others count 1"""


class Assigner(Protocol):
    """Targets of one clip; see the head of this file."""

    def __call__(
        self, points: Tensor, segments: Tensor, labels: Tensor, *, logits: Tensor, offsets: Tensor, mask: Tensor
    ) -> Targets:
        """The targets of one clip, without gradients."""


@dataclass(frozen=True)
class CentreSampling:
    """ActionFormer's assigner (section 3.3): the points near an action's centre learn it, whatever they predict.

    Of several actions the shortest is regressed; those of the same length to 1e-3 steps all count as classes (one
    movement under two labels).
    """

    radius: float
    """In strides of the point's level"""

    @torch.no_grad()
    def __call__(
        self, points: Tensor, segments: Tensor, labels: Tensor, *, logits: Tensor, offsets: Tensor, mask: Tensor
    ) -> Targets:
        """The targets of one clip; of the predictions only the number of classes matters."""
        num_classes = logits.shape[-1]
        if len(segments) == 0:
            return no_targets(points, num_classes)
        distances = distances_to_ends(points, segments)
        matched, shortest = near_centre(points, segments, distances, radius=self.radius)
        return _targets(points, distances, labels, matched, shortest, points.new_ones(len(points)), num_classes)


@dataclass(frozen=True)
class SimOTA:
    """TemporalMaxer's assigner: among the points that `CentreSampling` allows, targets follow the predictions.

        cost of (point, action) = class_weight * focal loss + iou_weight * DIoU loss, infinite outside of the action

    A positive point regresses the action of the lowest cost, which need not be the one that made it positive. It
    counts 1 if it is among the `keep_share` cheapest points of any action, else `confused_weight`.
    """

    radius: float
    """In strides of the point's level"""
    class_weight: float
    """Of the classification in the cost"""
    iou_weight: float
    """Of the regression in the cost"""
    keep_share: float
    """Share of the points inside an action that count in full"""
    confused_weight: float
    """What the other points inside it count"""

    @torch.no_grad()
    def __call__(
        self, points: Tensor, segments: Tensor, labels: Tensor, *, logits: Tensor, offsets: Tensor, mask: Tensor
    ) -> Targets:
        """The targets of one clip; points that are not real have none and cost nothing to the others."""
        num_classes = logits.shape[-1]
        if len(segments) == 0:
            return no_targets(points, num_classes)
        distances = distances_to_ends(points, segments)
        cost = self._cost(logits, offsets, distances / points[:, 3, None, None], labels)
        cost = torch.where(mask[:, None], cost, torch.inf)
        inside = cost < torch.inf
        matched, _ = near_centre(points, segments, distances, radius=self.radius)
        # Ranks start at 0. An action keeps floor(share * count), as the public implementation rounds.
        num_kept = (inside.sum(dim=0) * self.keep_share).to(torch.int64)
        rank = cost.argsort(dim=0, stable=True).argsort(dim=0)  # the place of each point in the order of costs
        kept = (inside & (rank < num_kept)).any(dim=1)
        weights = torch.where(inside.any(dim=1) & ~kept, self.confused_weight, 1.0)
        return _targets(points, distances, labels, matched & inside, cost.argmin(dim=1), weights, num_classes)

    def _cost(self, logits: Tensor, offsets: Tensor, distances: Tensor, labels: Tensor) -> Tensor:
        """(P, N); `distances` (P, N, 2) in strides."""
        # The focal loss of all classes against each action, without holding (P, N, K) numbers: an action changes the
        # target of one class only.
        missed = sigmoid_focal_loss(logits, torch.ones_like(logits))
        absent = sigmoid_focal_loss(logits, torch.zeros_like(logits))
        classification = absent.sum(dim=1, keepdim=True) + (missed - absent)[:, labels]
        regression = diou_loss(offsets[:, labels] if offsets.ndim == 3 else offsets[:, None], distances)
        cost = self.class_weight * classification + self.iou_weight * regression
        # DIoU is defined only where the point lies inside the action.
        return torch.where((distances >= 0).all(dim=-1), cost, torch.inf)


def no_targets(points: Tensor, num_classes: int) -> Targets:
    """Of a clip without actions."""
    num_points = len(points)
    return Targets(
        points.new_zeros(num_points, num_classes), points.new_zeros(num_points, 2), points.new_ones(num_points)
    )


def distances_to_ends(points: Tensor, segments: Tensor) -> Tensor:
    """From P points to the starts and ends of N segments, in steps, negative outside: (P, N, 2)."""
    position, (start, end) = points[:, :1], segments.unbind(1)
    return torch.stack([position - start, end - position], dim=-1)


def near_centre(points: Tensor, segments: Tensor, distances: Tensor, *, radius: float) -> tuple[Tensor, Tensor]:
    """Which points may learn which of N segments (P, N), and for each point the shortest of them (P,).

    A point may learn a segment if it lies strictly inside it, within `radius` strides of its centre, and its larger
    distance to the two ends lies in the point's regression range; of several only the shortest, and those of the same
    length. Both ends of the range count, as in the public implementations: a distance of exactly 4 belongs to two
    levels.
    """
    position, low, high, stride = (column[:, None] for column in points.unbind(1))
    start, end = segments.unbind(1)
    centre, reach = 0.5 * (start + end), radius * stride
    # Strictly: the targets of a point on an end would be a distance of 0.
    near = (position > torch.maximum(centre - reach, start)) & (position < torch.minimum(centre + reach, end))
    farther = distances.amax(dim=-1)
    candidate = near & (farther >= low) & (farther <= high)
    # A point without a candidate has the length inf, which compares as equal; `candidate` then is False.
    lengths = torch.where(candidate, end - start, torch.inf)
    shortest, choice = lengths.min(dim=1)
    return candidate & (lengths <= shortest[:, None] + SIMILAR_LENGTH_STEPS), choice


def _targets(
    points: Tensor,
    distances: Tensor,
    labels: Tensor,
    matched: Tensor,
    regressed: Tensor,
    weights: Tensor,
    num_classes: int,
) -> Targets:
    """`matched` (P, N) gives the classes, `regressed` (P,) the segment whose distances count."""
    one_hot = F.one_hot(labels, num_classes).to(points.dtype)
    classes = (matched.to(points.dtype) @ one_hot).clamp(max=1.0)  # several actions may be of one class
    return Targets(
        classes, distances[torch.arange(len(points), device=points.device), regressed] / points[:, 3:], weights
    )
