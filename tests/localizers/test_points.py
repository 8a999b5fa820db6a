"""Which point learns which action, in cases worked by hand."""

from __future__ import annotations

import torch

from re2tal.localizers.pyramid.assignment import CentreSampling
from re2tal.localizers.pyramid.points import decode, pyramid_points

RANGES = ((0, 4), (4, 8), (8, 10_000))
POINTS = pyramid_points(16, RANGES)


def assign(segments: list[list[float]], labels: list[int], *, points: torch.Tensor = POINTS) -> tuple:
    classes, offsets, weights = CentreSampling(1.5)(
        points,
        torch.tensor(segments).reshape(-1, 2),
        torch.tensor(labels, dtype=torch.int64),
        logits=torch.zeros(len(points), 3),
        offsets=torch.zeros(len(points), 2),
        mask=torch.ones(len(points), dtype=torch.bool),
    )
    assert torch.equal(weights, torch.ones(len(points)))
    return classes, offsets


def positive_points(classes: torch.Tensor, *, label: int) -> list[tuple[float, float]]:
    """(step, stride) of the points that learn this class."""
    return [(step, stride) for step, _, _, stride in POINTS[classes[:, label] == 1].tolist()]


def test_points_lie_on_multiples_of_their_stride_finest_level_first() -> None:
    assert POINTS[:16, 0].tolist() == list(range(16))
    assert POINTS[16:].tolist() == [[2.0 * i, 4, 8, 2] for i in range(8)] + [[4.0 * i, 8, 10_000, 4] for i in range(4)]


def test_a_short_action_is_learned_near_its_centre_on_the_finest_level() -> None:
    # Centre 5, radius 1.5 steps: points 4, 5, 6; the farther end is at most 3 away, so level 0.
    classes, offsets = assign([[3.0, 7.0]], [1])
    assert positive_points(classes, label=1) == [(4, 1), (5, 1), (6, 1)]
    assert offsets[[4, 5, 6]].tolist() == [[1, 3], [2, 2], [3, 1]]
    assert classes[:, [0, 2]].sum() == 0


def test_a_longer_action_is_learned_on_the_levels_of_its_length_in_strides_of_that_level() -> None:
    # Centre 7. Stride 2, radius 3: points 6 and 8, both 6.5 from the farther end; 4 and 10 lie on the edge.
    # Stride 4, radius 6: points 4 and 12, 8.5 and 10.5 from the farther end; 8 is 6.5 from it, the level before's.
    classes, offsets = assign([[1.5, 12.5]], [0])
    assert positive_points(classes, label=0) == [(6, 2), (8, 2), (4, 4), (12, 4)]
    assert offsets[classes[:, 0] == 1].tolist() == [[2.25, 3.25], [3.25, 2.25], [0.625, 2.125], [2.625, 0.125]]


def test_a_point_on_the_very_start_or_end_does_not_learn_the_action() -> None:
    classes, _ = assign([[4.0, 5.0]], [0])
    assert positive_points(classes, label=0) == []


def test_a_distance_on_the_border_of_two_ranges_belongs_to_both() -> None:
    # Point 4 is exactly 4 from the end: level 0 learns up to 4, level 1 from 4, as in both public implementations.
    classes, _ = assign([[1.0, 8.0]], [2])
    # Centre 4.5: level 0 has 4 (reach 4) and 5 (reach 4); level 1 (radius 3) has 4 (reach 4), 2 (reach 6) and 6 (5).
    assert positive_points(classes, label=2) == [(4, 1), (5, 1), (2, 2), (4, 2), (6, 2)]


def test_of_two_actions_the_shorter_is_regressed() -> None:
    classes, offsets = assign([[2.0, 9.0], [4.0, 7.0]], [0, 1])
    assert classes[5].tolist() == [0, 1, 0]
    assert offsets[5].tolist() == [1, 2]


def test_one_movement_under_two_labels_teaches_both() -> None:
    classes, _ = assign([[4.0, 7.0], [4.0, 7.0005]], [0, 2])
    assert classes[5].tolist() == [1, 0, 1]


def test_the_same_action_twice_counts_once() -> None:
    classes, _ = assign([[4.0, 7.0], [4.0, 7.0]], [1, 1])
    assert classes[5].tolist() == [0, 1, 0]


def test_a_clip_without_actions_has_no_positive_point() -> None:
    classes, offsets = assign([], [])
    assert classes.shape == (len(POINTS), 3)
    assert offsets.shape == (len(POINTS), 2)
    assert classes.sum() == 0


def test_decoding_the_targets_gives_the_action_back() -> None:
    classes, offsets = assign([[1.5, 12.5]], [0])
    segments = decode(POINTS, offsets)[classes[:, 0] == 1]
    assert segments.tolist() == [[1.5, 12.5]] * 4
