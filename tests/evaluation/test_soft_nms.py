"""Soft-NMS against its definition: one pick after the other, in plain Python, however the segments lie."""

from __future__ import annotations

import math

import numpy as np
import pytest

from re2tal.evaluation import soft_nms as module
from re2tal.evaluation.overlaps import reach
from re2tal.evaluation.soft_nms import soft_nms
from re2tal.evaluation.suppression import _PENALTIES, SuppressionConfig

METHODS = [
    SuppressionConfig(method="gaussian", sigma=0.5),
    SuppressionConfig(method="linear", iou_threshold=0.2),
    SuppressionConfig(method="gaussian_above", overlap_base=0.1, overlap_slope=0.02),
    SuppressionConfig(method="hard", iou_threshold=0.4),
    SuppressionConfig(method="hard", iou_threshold=0.0),  # suppresses what does not overlap, too
]


def decay(iou: float, length: float, config: SuppressionConfig) -> float:
    match config.method:
        case "gaussian":
            return math.exp(-(iou**2) / config.sigma)
        case "linear":
            return 1 - iou if iou >= config.iou_threshold else 1.0
        case "gaussian_above":
            mild = iou < config.overlap_base + config.overlap_slope * length
            return 1.0 if mild else math.exp(-(iou**2) / config.sigma)
    return 0.0 if iou >= config.iou_threshold else 1.0


def by_definition(
    segments: np.ndarray,
    scores: np.ndarray,
    groups: np.ndarray,
    config: SuppressionConfig,
    *,
    min_score: float,
    most: int,
) -> tuple[dict[int, float], int]:
    """Index -> lowered score, of one group after the other; how many were still high enough when it ended."""
    kept, num_left = {}, 0
    for group in set(groups.tolist()):
        left = {int(index): float(scores[index]) for index in np.flatnonzero(groups == group)}
        picks = 0
        while left and picks < most:
            best = max(left, key=lambda index: left[index])
            if left[best] < max(min_score, 1e-300) and picks:
                break
            kept[best] = left.pop(best)
            picks += 1
            start, end = segments[best]
            length = end - start + 1e-6
            for index in left:
                overlap = max(0.0, min(end, segments[index][1]) - max(start, segments[index][0]))
                union = length + segments[index][1] - segments[index][0] + 1e-6 - overlap
                left[index] *= decay(overlap / union, length, config)
        num_left += sum(score >= max(min_score, 1e-300) for score in left.values())
    return kept, num_left


WAYS = {
    "as chosen": {},
    "rounds": {"MAX_OVERLAPS_IN_ROUNDS": math.inf},
    "one by one": {"MAX_OVERLAPS_IN_ROUNDS": -1, "MAX_ONE_BY_ONE": 99, "MAX_OVERLAPS_ONE_BY_ONE": math.inf},
    "table": {"MAX_OVERLAPS_IN_ROUNDS": -1, "MAX_ONE_BY_ONE": 0},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("config", METHODS, ids=lambda config: f"{config.method}-{config.iou_threshold}")
@pytest.mark.parametrize("mean_length", [0.2, 2.0, 30.0])
def test_in_every_way_and_however_segments_lie_the_picks_are_those_of_the_definition(
    config: SuppressionConfig, mean_length: float, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in WAYS[way].items():
        monkeypatch.setattr(module, name, value)
    random = np.random.default_rng(int(10 * mean_length))
    num = 70
    min_score = 0.0 if config.method == "hard" else 0.05
    penalty = _PENALTIES[config.method](config)
    for num_groups, most in [(1, 500), (1, 7), (5, 500), (5, 3)]:
        centres, lengths = random.uniform(0, 100, num), random.exponential(mean_length, num) + 0.01
        groups = random.integers(num_groups, size=num)
        lengths[groups % 2 == 1] *= 20  # some groups are dense, some sparse
        segments = np.stack([centres - lengths / 2, centres + lengths / 2], axis=1).astype(np.float32)
        scores = random.random(num).astype(np.float32)
        scores[groups == 4] *= 0.05  # only the best one of this group stays
        index, lowered, num_left = soft_nms(
            segments, scores, groups, penalty=penalty, min_score=min_score, max_per_group=most
        )
        limits = {"min_score": min_score, "most": most}
        expected, most_left = by_definition(segments.astype(float), scores, groups, config, **limits)
        everything, _ = by_definition(segments.astype(float), scores, groups, config, **limits | {"most": num})
        assert set(index.tolist()) == set(expected)
        np.testing.assert_allclose(lowered, [expected[one] for one in index.tolist()], rtol=2e-5)
        assert len(everything) - len(expected) <= num_left <= most_left


@pytest.mark.parametrize("way", WAYS)
def test_of_equal_scores_the_first_one_suppresses_the_other(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in WAYS[way].items():
        monkeypatch.setattr(module, name, value)
    starts = np.arange(0, 90, 3, dtype=np.float32)[::-1]
    segments, scores = np.stack([starts, starts + 4], axis=1), np.full(30, 0.5, dtype=np.float32)
    config = SuppressionConfig(method="linear", iou_threshold=0.1)
    index, lowered, _ = soft_nms(
        segments, scores, np.zeros(30), penalty=_PENALTIES["linear"](config), min_score=0.001, max_per_group=99
    )
    # Each overlaps with the next by 1 of 7: the first in the list is picked, then the third, and so on.
    assert dict(zip(index.tolist(), lowered.tolist(), strict=True)) == pytest.approx(
        {number: 0.5 if number % 2 == 0 else 0.5 * (6 / 7) ** (2 if number < 29 else 1) for number in range(30)}
    )


@pytest.mark.parametrize("way", WAYS)
def test_a_segment_that_ends_before_it_starts_leaves_the_others_alone(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in results of other programs: its length and that of another, which it does not touch, may add up to 0."""
    for name, value in WAYS[way].items():
        monkeypatch.setattr(module, name, value)
    segments = np.array([[200, 400], [300, 100], [210, 410], [230, 430]], dtype=np.float32)
    scores, options = np.array([0.8, 0.9, 0.7, 0.6], dtype=np.float32), {"min_score": 0.001, "max_per_group": 9}
    penalty = _PENALTIES["gaussian"](SuppressionConfig())
    found = dict(zip(*soft_nms(segments, scores, np.zeros(4), penalty=penalty, **options)[:2], strict=True))
    sound = [0, 2, 3]
    index, lowered, _ = soft_nms(segments[sound], scores[sound], np.zeros(3), penalty=penalty, **options)
    assert found == {1: scores[1], **{sound[one]: score for one, score in zip(index, lowered, strict=True)}}


def test_a_score_that_equals_the_least_one_stays() -> None:
    """Logarithms of one number by two functions differ in the last bit, for about one number in 600."""
    scores = np.arange(1, 2**16, 23, dtype=np.float32) / np.float32(2**16)
    penalty = _PENALTIES["gaussian"](SuppressionConfig())
    segments = np.array([[0, 1], [5, 6]], dtype=np.float32)
    for score in scores[:-1]:
        given = np.array([1.0, score], dtype=np.float32)
        index, _, _ = soft_nms(segments, given, np.zeros(2), penalty=penalty, min_score=float(score), max_per_group=9)
        assert len(index) == 2, score


def test_a_segment_reaches_as_far_as_others_start_before_it_ends() -> None:
    segments = np.array([[0, 2], [1, 5], [2, 3], [4, 6], [9, 8], [1, 2], [1, 3]], dtype=np.float32)
    assert reach(segments, np.array([0, 0, 0, 0, 0, 3, 3])).tolist() == [2, 4, 3, 4, 5, 7, 7]  # touching is no overlap
