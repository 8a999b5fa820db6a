"""Soft-NMS against its definition: one pick after the other, in plain Python, however the segments lie."""

from __future__ import annotations

import math

import numpy as np
import pytest

from re2tal.evaluation.soft_nms import _cheapest, find_clusters, soft_nms
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


@pytest.mark.parametrize("config", METHODS, ids=lambda config: f"{config.method}-{config.iou_threshold}")
@pytest.mark.parametrize("mean_length", [0.2, 2.0, 30.0])
@pytest.mark.parametrize(("num_groups", "most"), [(1, 500), (1, 7), (5, 500), (5, 3)])
def test_however_segments_cluster_the_picks_are_those_of_the_definition(
    config: SuppressionConfig, mean_length: float, num_groups: int, most: int
) -> None:
    random = np.random.default_rng(int(10 * mean_length) + num_groups)
    num = 150
    centres, lengths = random.uniform(0, 100, num), random.exponential(mean_length, num) + 0.01
    segments = np.stack([centres - lengths / 2, centres + lengths / 2], axis=1).astype(np.float32)
    scores, groups = random.random(num).astype(np.float32), random.integers(num_groups, size=num)
    min_score = 0.0 if config.method == "hard" else 0.05
    index, lowered, num_left = soft_nms(
        segments, scores, groups, penalty=_PENALTIES[config.method](config), min_score=min_score, max_per_group=most
    )
    limits = {"min_score": min_score, "most": most}
    expected, most_left = by_definition(segments.astype(float), scores, groups, config, **limits)
    everything, _ = by_definition(segments.astype(float), scores, groups, config, **limits | {"most": num})
    assert set(index.tolist()) == set(expected)
    np.testing.assert_allclose(lowered, [expected[one] for one in index.tolist()], rtol=2e-5)
    assert len(everything) - len(expected) <= num_left <= most_left


def test_clusters_are_chains_of_overlaps_in_one_group() -> None:
    segments = np.array([[0, 2], [1, 5], [4, 6], [6, 7], [1, 2], [9, 8]], dtype=np.float32)
    clusters = find_clusters(segments, np.array([0, 0, 0, 0, 1, 0]))
    assert clusters[0] == clusters[1] == clusters[2]
    assert len({clusters[0], *clusters[3:].tolist()}) == 4  # touching is no overlap


def test_many_small_clusters_are_not_one_wide_table() -> None:
    random = np.random.default_rng(0)
    starts = random.uniform(0, 600, 2000).astype(np.float32)
    groups = np.zeros(2000, dtype=np.int64)
    clusters = find_clusters(np.stack([starts, starts + 0.4], axis=1), groups)
    tables = _cheapest(groups, clusters, max_picks=2000)
    assert len(tables) > 1
    assert len(_cheapest(groups, clusters, max_picks=50)) == 1  # few picks of one row are cheaper than all of many
    assert sorted(np.concatenate([rows for rows, _ in tables]).tolist()) == list(range(2000))
