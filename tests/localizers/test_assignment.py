"""SimOTA in cases worked by hand, and against its definition written out."""

from __future__ import annotations

import math

import torch

from re2tal.localizers.losses import sigmoid_focal_loss
from re2tal.localizers.pyramid.assignment import CentreSampling, SimOTA, Targets
from re2tal.localizers.pyramid.points import pyramid_points

POINTS = pyramid_points(8, ((0, 10_000),))


def assign(
    segments: list[list[float]],
    labels: list[int],
    *,
    offsets: torch.Tensor | None = None,
    logits: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    points: torch.Tensor = POINTS,
    **changes: float,
) -> Targets:
    settings = {"radius": 2.5, "class_weight": 1.0, "iou_weight": 1.0, "keep_share": 0.5, "confused_weight": 0.1}
    num_points = len(points)
    return SimOTA(**(settings | changes))(
        points,
        torch.tensor(segments).reshape(-1, 2),
        torch.tensor(labels, dtype=torch.int64),
        logits=torch.zeros(num_points, 2) if logits is None else logits,
        offsets=torch.ones(num_points, 2) if offsets is None else offsets,
        mask=torch.ones(num_points, dtype=torch.bool) if mask is None else mask,
    )


def test_the_cheapest_share_of_the_points_inside_counts_in_full() -> None:
    # Points 1 to 5 lie in [1, 5], ends included: 5, of which floor(0.5 * 5) = 2 are kept. Point 3 predicts exactly
    # [1, 5], point 2 nearly.
    offsets = torch.ones(8, 2)
    offsets[3] = torch.tensor([2.0, 2.0])
    offsets[2] = torch.tensor([1.0, 2.5])
    classes, regressed, weights = assign([[1.0, 5.0]], [1], offsets=offsets)
    # Centre 3, radius 2.5, strictly inside: 2, 3, 4.
    assert classes[:, 1].tolist() == [0, 0, 1, 1, 1, 0, 0, 0]
    assert classes[:, 0].sum() == 0
    assert regressed[2:5].tolist() == [[1, 3], [2, 2], [3, 1]]
    torch.testing.assert_close(weights, torch.tensor([1, 0.1, 1, 1, 0.1, 0.1, 1, 1]))


def test_a_point_regresses_the_action_that_it_predicts_best_and_learns_the_class_of_the_shorter() -> None:
    # Point 3 lies in [2, 4] and in [0, 8] and predicts [0, 8]: it is positive for the shorter, regresses the longer.
    offsets = torch.ones(8, 2)
    offsets[3] = torch.tensor([3.0, 5.0])
    classes, regressed, _ = assign([[2.0, 4.0], [0.0, 8.0]], [0, 1], offsets=offsets)
    assert classes[3].tolist() == [1, 0]
    assert regressed[3].tolist() == [3, 5]


def test_the_classes_scores_are_part_of_the_cost() -> None:
    logits = torch.zeros(8, 2)
    logits[4] = torch.tensor([-4.0, 4.0])
    segments, labels = [[2.0, 6.0], [2.0, 6.0]], [0, 1]
    offsets = assign(segments, labels, logits=logits).offsets
    assert offsets[4].tolist() == [2, 2]
    kept = assign(segments, labels, logits=logits, keep_share=0.21, confused_weight=0.0).weights
    # Of five points inside, one is kept per action: 4 for class 1, and for class 0 one that does not deny it.
    assert kept[4] == 1
    assert kept[2:7].sum() == 2
    without = assign(segments, labels, logits=logits, class_weight=0.0, keep_share=1.0).weights
    assert torch.equal(without, torch.ones(8))


def test_the_cost_is_that_of_the_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(8, 2, generator=generator, dtype=torch.float64)
    offsets = torch.rand(8, 2, generator=generator, dtype=torch.float64) * 4
    segments, labels = torch.tensor([[0.5, 6.5], [1.0, 4.0]], dtype=torch.float64), torch.tensor([1, 0])
    ours = SimOTA(1.5, class_weight=0.7, iou_weight=3.0, keep_share=1.0, confused_weight=0.0)
    position = POINTS[:, 0].double()
    distances = torch.stack([position[:, None] - segments[:, 0], segments[:, 1] - position[:, None]], dim=-1)
    cost = ours._cost(logits, offsets, distances, labels)
    for point in range(8):
        for action, label in enumerate(labels.tolist()):
            (left, right), (start, end) = offsets[point].tolist(), segments[action].tolist()
            here = point
            if not start <= here <= end:
                assert cost[point, action] == math.inf
                continue
            target = torch.tensor([1.0 if k == label else 0.0 for k in range(2)], dtype=torch.float64)
            focal = sigmoid_focal_loss(logits[point], target).sum().item()
            low, high = here - left, here + right
            union = max(high, end) - min(low, start)
            iou = (min(high, end) - max(low, start)) / union
            diou = 1 - iou + ((low + high - start - end) / 2 / union) ** 2
            assert abs(cost[point, action].item() - (0.7 * focal + 3.0 * diou)) < 1e-12


def test_padded_points_take_no_share_and_have_no_targets() -> None:
    # Only 3, 4 and 5 of the five points inside are real: floor(0.7 * 3) = 2 of them count in full.
    mask = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1], dtype=torch.bool)
    classes, _, weights = assign([[1.0, 5.0]], [0], mask=mask, keep_share=0.7, confused_weight=0.25)
    assert classes[:3].sum() == 0
    assert sorted(weights[3:6].tolist()) == [0.25, 1, 1]
    none = assign([[1.0, 5.0]], [0], mask=torch.zeros(8, dtype=torch.bool))
    assert none.classes.sum() == 0


def test_an_action_that_no_point_lies_in_and_a_clip_without_actions_have_no_targets() -> None:
    for targets in (assign([[1.2, 1.8]], [0]), assign([[30.0, 40.0]], [0]), assign([], [])):
        assert targets.classes.shape == (8, 2)
        assert targets.classes.sum() == 0
        assert torch.equal(targets.weights, torch.ones(8))


def test_where_all_points_count_in_full_the_classes_are_those_of_centre_sampling() -> None:
    points = pyramid_points(13, ((0, 4), (2, 8), (4, 10_000)))
    segments, labels = [[0.5, 3.0], [2.0, 11.5], [4.0, 5.5], [4.0, 5.5]], [0, 1, 1, 0]
    ours = assign(segments, labels, points=points, keep_share=1.0, radius=1.5)
    num_points = len(points)
    reference = CentreSampling(1.5)(
        points,
        torch.tensor(segments),
        torch.tensor(labels),
        logits=torch.zeros(num_points, 2),
        offsets=torch.zeros(num_points, 2),
        mask=torch.ones(num_points, dtype=torch.bool),
    )
    assert torch.equal(ours.classes, reference.classes)
    assert torch.equal(ours.weights, torch.ones(num_points))
