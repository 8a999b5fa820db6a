"""Targets and losses of points on random clips against loops over points, actions and classes, in float64.

Actions begin before the clip, have no length, share their extent, or are as long as another to 1e-3 steps.
"""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

import numpy as np
import pytest
import torch

from re2tal.localizers.losses import RunningCount
from re2tal.localizers.pyramid.assignment import CentreSampling, SimOTA, Targets
from re2tal.localizers.pyramid.loss import PointLoss
from re2tal.localizers.pyramid.points import PyramidOutputs, pyramid_points

INITIAL, MOMENTUM = 50, 0.9


class Clip(NamedTuple):
    points: np.ndarray
    actions: np.ndarray
    labels: np.ndarray
    logits: np.ndarray
    offsets: np.ndarray
    mask: np.ndarray

    def tensors(self) -> list[torch.Tensor]:
        return [torch.from_numpy(part if part.dtype.kind != "f" else part.astype(np.float32)) for part in self]

    def offset(self, point: int, label: int) -> np.ndarray:
        return self.offsets[point, label] if self.offsets.ndim == 3 else self.offsets[point]


def random_clip(seed: int) -> Clip:
    """Numbers are multiples of 1/64, which float32 holds, so that both sides decide on the same ones."""
    random = np.random.default_rng(seed)
    levels, num_classes, num_actions = (
        random.integers(1, 4),
        random.integers(1, 4),
        random.integers(0 if seed else 1, 6),
    )
    num_steps = 2 ** (levels - 1) * int(random.integers(2, 6))
    ranges = [(2.0 * 2**level if level else 0.0, 6.0 * 2**level) for level in range(levels)]
    points = pyramid_points(num_steps, ranges).double().numpy()
    starts = random.integers(-2 * 64, num_steps * 64, num_actions) / 64
    actions = np.stack([starts, starts + random.integers(0, num_steps * 32, num_actions) / 64], axis=1)
    if num_actions > 2:
        actions[0, 1] = actions[0, 0]
        actions[1] = actions[2] + [0, 2.0 ** -random.choice([8, 11])]
    shape = (len(points), num_classes, 2) if seed % 2 else (len(points), 2)
    offsets = np.maximum(random.integers(-64, 256, shape), 0) / 64
    logits = random.integers(-256, 256, (len(points), num_classes)) / 64
    labels = random.integers(num_classes, size=num_actions)
    return Clip(points, actions, labels, logits, offsets, random.random(len(points)) < 0.8)


def focal(logit: float, target: float) -> float:
    p = 1 / (1 + np.exp(-logit))
    wrong = p * (1 - target) + (1 - p) * target
    weight = 0.25 * target + 0.75 * (1 - target)
    return float(-weight * wrong**2 * (target * np.log(p) + (1 - target) * np.log(1 - p)))


def iou(one: np.ndarray, other: np.ndarray) -> float:
    shared = np.minimum(one, other).sum()
    return float(shared / max(one.sum() + other.sum() - shared, 1e-8))


def diou(one: np.ndarray, other: np.ndarray) -> float:
    apart = ((one[1] - one[0]) - (other[1] - other[0])) / 2
    return 1 - iou(one, other) + float(apart / max(np.maximum(one, other).sum(), 1e-8)) ** 2


def wanted(clip: Clip, point: int, action: int) -> np.ndarray:
    position, _, _, stride = clip.points[point]
    return np.array([position - clip.actions[action, 0], clip.actions[action, 1] - position]) / stride


def near(clip: Clip, point: int, radius: float) -> list[int]:
    """The shortest of the actions that the point may learn, and those as long as it."""
    position, low, high, stride = clip.points[point]
    found = []
    for action, (start, end) in enumerate(clip.actions):
        reach, centre = radius * stride, (start + end) / 2
        inside = max(start, centre - reach) < position < min(end, centre + reach)
        if inside and low <= wanted(clip, point, action).max() * stride <= high:
            found.append(action)
    lengths = clip.actions[:, 1] - clip.actions[:, 0]
    shortest = min((lengths[one] for one in found), default=0.0)
    return sorted((one for one in found if lengths[one] <= shortest + 1e-3), key=lambda one: lengths[one])


def cost(clip: Clip, point: int, action: int, assign: SimOTA) -> float:
    target, label = wanted(clip, point, action), clip.labels[action]
    if not clip.mask[point] or target.min() < 0:
        return np.inf
    one_hot = np.arange(clip.logits.shape[1]) == label
    classes = sum(focal(logit, hot) for logit, hot in zip(clip.logits[point], one_hot, strict=True))
    return assign.class_weight * classes + assign.iou_weight * diou(clip.offset(point, label), target)


def targets_by_loops(clip: Clip, assign: CentreSampling | SimOTA) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    num_points, num_actions = len(clip.points), len(clip.actions)
    classes, offsets, weights = np.zeros_like(clip.logits), np.zeros((num_points, 2)), np.ones(num_points)
    costs = np.full((num_points, num_actions), np.inf)
    if isinstance(assign, SimOTA):
        for point, action in product(range(num_points), range(num_actions)):
            costs[point, action] = cost(clip, point, action, assign)
        kept = np.zeros(num_points, dtype=bool)
        for of_action in costs.T:
            kept[np.argsort(of_action, kind="stable")[: int(np.isfinite(of_action).sum() * assign.keep_share)]] = True
        weights[np.isfinite(costs).any(axis=1) & ~kept] = assign.confused_weight
    for point in range(num_points):
        chosen = near(clip, point, assign.radius)
        if isinstance(assign, SimOTA):
            chosen = [action for action in chosen if np.isfinite(costs[point, action])]
        if chosen:
            classes[point, clip.labels[chosen]] = 1
            regressed = costs[point].argmin() if isinstance(assign, SimOTA) else chosen[0]
            offsets[point] = wanted(clip, point, regressed)
    return classes, offsets, weights


ASSIGNERS = [
    CentreSampling(1.5),
    SimOTA(2.5, class_weight=1.0, iou_weight=3.0, keep_share=0.625, confused_weight=0.25),
    SimOTA(1.5, class_weight=0.5, iou_weight=2.0, keep_share=1.0, confused_weight=0.0),
]


@pytest.mark.parametrize("assign", ASSIGNERS, ids=["centre", "share", "all"])
@pytest.mark.parametrize("seed", range(10))
def test_every_point_has_the_targets_and_the_losses_of_the_loops(seed: int, assign: CentreSampling | SimOTA) -> None:
    clip = random_clip(seed)
    points, actions, labels, logits, offsets, mask = clip.tensors()
    found = assign(points, actions, labels, logits=logits, offsets=offsets, mask=mask)
    classes, regressed, weights = targets_by_loops(clip, assign)
    assert np.array_equal(found.classes, classes)
    positive = classes.any(axis=1)
    np.testing.assert_allclose(found.offsets[positive], regressed[positive], rtol=1e-6)
    np.testing.assert_allclose(found.weights, weights)

    training, power, smoothing = bool(seed % 2), (0.0, 0.25, 1.0)[seed % 3], (0.0, 0.125)[seed // 2 % 2]
    count = RunningCount(INITIAL, momentum=MOMENTUM)
    losses = PointLoss(smoothing, 2.0, stored_count=seed > 2, iou_power=power)(
        PyramidOutputs(logits[None], offsets[None], points, mask[None], torch.empty(0)),
        Targets(*(part[None] for part in found)),
        positives=count,
        training=training,
    )
    total, regression, num_classes = 0.0, 0.0, classes.shape[1]
    for point in mask.nonzero()[:, 0].tolist():
        weight = weights[point] if positive[point] else 1.0
        overlaps = [(clip.offset(point, label), regressed[point]) for label in np.flatnonzero(classes[point])]
        regression += weight * sum(diou(*pair) for pair in overlaps[: None if offsets.ndim == 3 else 1])
        for label, hot in enumerate(classes[point]):
            target = hot * (1 - smoothing) + smoothing / (num_classes + 1)
            share = max(iou(clip.offset(point, label), regressed[point]), 1e-8) ** power if hot else 1.0
            total += weight * share * focal(clip.logits[point, label], target)
    num_positive = max((positive & clip.mask).sum(), 1)
    divisor = MOMENTUM * INITIAL + (1 - MOMENTUM) * num_positive if training else num_positive
    stored = INITIAL if seed > 2 and not training else divisor
    assert losses["classification"].item() == pytest.approx(total / stored, rel=1e-5)
    assert losses["regression"].item() == pytest.approx(2 * regression / divisor, rel=1e-5)
