"""Anchors, matching and the losses on segments, in cases worked by hand."""

from __future__ import annotations

import math

import pytest
import torch

from re2tal.localizers.vsgn.anchors import balanced_bce, decode, evaluation_targets, giou_loss, match, pyramid_anchors


def test_anchors_of_scale_one_cover_exactly_the_steps_of_their_stride() -> None:
    anchors = pyramid_anchors(8, (2, 4), (1.0,))
    # Length end - start + 1: steps 0.5 to 1.5 are two steps.
    assert anchors.tolist() == [[0.5, 1.5], [2.5, 3.5], [4.5, 5.5], [6.5, 7.5], [0.5, 3.5], [4.5, 7.5]]


def test_an_offset_of_zero_is_the_anchor_and_others_shift_and_stretch_it() -> None:
    anchors = torch.tensor([[0.5, 3.5]])
    assert decode(anchors, torch.zeros(1, 1, 2)).tolist() == [[[0.5, 3.5]]]
    # Shifted by 5 / 10 of its length 4, stretched by e^(5 ln 2 / 5) = 2: centre 4, length 8.
    moved = decode(anchors, torch.tensor([[[5.0, 5 * math.log(2)]]]))
    torch.testing.assert_close(moved, torch.tensor([[[0.5, 7.5]]]))
    assert decode(anchors, torch.tensor([[[0.0, 1e9]]])).isfinite().all()


def test_segments_match_the_action_they_overlap_most_if_enough() -> None:
    segments = torch.tensor([[0.0, 9.0], [0.0, 4.0], [20.0, 29.0], [40.0, 49.0]])
    actions, labels = torch.tensor([[0.0, 10.0], [20.0, 30.0]]), torch.tensor([2, 0])
    matches = match(segments, actions, labels, min_iou=0.5)
    # IoU of the second with the first action: 4 / (5 + 10 - 4).
    assert matches.labels.tolist() == [3, 0, 1, 0]
    assert matches.segments[[0, 2]].tolist() == actions.tolist()


def test_an_action_always_has_its_best_segments_but_never_one_that_does_not_touch_it() -> None:
    segments = torch.tensor([[0.0, 3.0], [7.0, 10.0], [20.0, 29.0]])
    actions, labels = torch.tensor([[0.0, 10.0], [60.0, 70.0]]), torch.tensor([0, 1])
    assert match(segments, actions, labels, min_iou=0.5).labels.tolist() == [1, 1, 0]


def test_without_actions_everything_is_background() -> None:
    nothing = match(torch.tensor([[0.0, 3.0]]), torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64), min_iou=0.5)
    assert nothing.labels.tolist() == [0]


def test_giou_loss_in_numbers() -> None:
    # The same; half; apart: 1 - 0 + (30 - 20) / 30; the wrong way round.
    segments = torch.tensor([[0.0, 10.0], [0.0, 5.0], [20.0, 30.0], [10.0, 0.0]])
    targets = torch.tensor([[0.0, 10.0]]).expand(4, 2)
    torch.testing.assert_close(giou_loss(segments, targets), torch.tensor([0.0, 0.5, 4 / 3, 0.0]))


def test_steps_wholly_near_a_boundary_or_inside_an_action_are_its_targets() -> None:
    targets = evaluation_targets(torch.tensor([[2.0, 7.5]]), 10)
    starts, ends, inside = ([step for step in range(10) if row[step]] for row in targets)
    # Start region 0.5 to 3.5, end region 6.0 to 9.0, action 2.0 to 7.5.
    assert (starts, ends, inside) == ([1, 2], [6, 7, 8], [2, 3, 4, 5, 6])
    assert not evaluation_targets(torch.zeros(0, 2), 10).any()


def test_positives_and_negatives_weigh_the_same_however_many() -> None:
    logits = torch.tensor([2.0, -1.0, -1.0, -1.0])
    targets = torch.tensor([True, False, False, False])
    reference = 0.5 * math.log1p(math.exp(-2)) + 0.5 * math.log1p(math.exp(-1))
    assert balanced_bce(logits, targets).item() == pytest.approx(reference, rel=1e-6)
    one_sided = balanced_bce(logits[1:], targets[1:])
    assert one_sided.item() == pytest.approx(math.log1p(math.exp(-1)), rel=1e-6)
