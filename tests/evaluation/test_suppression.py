"""Suppression against the textbook loop in float64, and in cases worked by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from re2tal.evaluation.suppression import SuppressionConfig, suppress
from re2tal.structures import Detections


def detections(*rows: tuple[float, float, float, int]) -> Detections:
    """(start, end, score, label) each."""
    table = torch.tensor(rows, dtype=torch.float64).reshape(-1, 4)
    return Detections(table[:, :2].float(), table[:, 2].float(), table[:, 3].long())


def random_detections(num: int, *, num_classes: int, seed: int, skewed: bool = False) -> Detections:
    generator = torch.Generator().manual_seed(seed)
    start = 100 * torch.rand(num, generator=generator)
    length = 0.1 + 30 * torch.rand(num, generator=generator) ** 2
    labels = torch.randint(num_classes, (num,), generator=generator)
    if skewed:
        labels = (labels * torch.rand(num, generator=generator) ** 3).long()
    scores = torch.rand(num, generator=generator)
    return Detections(torch.stack([start, start + length], dim=1), scores, labels)


def iou(first: list[float], second: list[float]) -> float:
    overlap = max(0.0, min(first[1], second[1]) - max(first[0], second[0]))
    return overlap / (first[1] - first[0] + second[1] - second[0] - overlap)


def textbook(found: Detections, decay: Callable[[float], float], *, min_score: float) -> list[tuple[float, int]]:
    """(score, index) of what stays, best first: the definition, one class after the other, in Python floats."""
    segments, kept = found.segments.tolist(), []
    for label in found.labels.unique().tolist():
        scores = {i: found.scores[i].item() for i in range(len(found)) if found.labels[i] == label}
        while scores:
            best = max(scores, key=scores.__getitem__)
            kept.append((scores.pop(best), best))
            scores = {i: score * decay(iou(segments[best], segments[i])) for i, score in scores.items()}
            scores = {i: score for i, score in scores.items() if score >= min_score}
    return sorted(kept, reverse=True)


@pytest.mark.parametrize(
    ("config", "decay"),
    [
        (SuppressionConfig(sigma=0.5), lambda overlap: math.exp(-(overlap**2) / 0.5)),
        (SuppressionConfig(method="linear", iou_threshold=0.3), lambda overlap: 1 - overlap if overlap >= 0.3 else 1.0),
        (
            SuppressionConfig(method="gaussian_above", sigma=0.5, overlap_base=0.4),
            lambda overlap: math.exp(-(overlap**2) / 0.5) if overlap >= 0.4 else 1.0,
        ),
        (SuppressionConfig(method="hard", iou_threshold=0.3), lambda overlap: 0.0 if overlap >= 0.3 else 1.0),
    ],
    ids=lambda value: value.method if isinstance(value, SuppressionConfig) else "",
)
@pytest.mark.parametrize(("num_classes", "skewed"), [(1, False), (4, False), (30, True)])
def test_every_method_is_the_textbook_loop(
    config: SuppressionConfig, decay: Callable[[float], float], num_classes: int, skewed: bool
) -> None:
    found = random_detections(300, num_classes=num_classes, seed=num_classes, skewed=skewed)
    reference = textbook(found, decay, min_score=0.001)
    ours = suppress(found, config)
    index = [i for _, i in reference]
    torch.testing.assert_close(ours.scores, torch.tensor([score for score, _ in reference]), rtol=1e-5, atol=0)
    assert torch.equal(ours.segments, found.segments[index])
    assert torch.equal(ours.labels, found.labels[index])


def test_gaussian_decay_in_numbers() -> None:
    # IoU 8 / 12 = 2/3: the second score becomes 0.8 exp(-(4/9) / 0.5); the third does not overlap.
    ours = suppress(detections((0, 10, 0.9, 0), (2, 12, 0.8, 0), (50, 60, 0.5, 0)), SuppressionConfig(sigma=0.5))
    assert ours.scores.tolist() == pytest.approx([0.9, 0.5, 0.8 * math.exp(-8 / 9)], rel=1e-5)
    assert ours.segments.tolist() == [[0, 10], [50, 60], [2, 12]]


def test_classes_suppress_each_other_only_when_told_to() -> None:
    found = detections((0, 10, 0.9, 0), (0, 10, 0.8, 1))
    hard = SuppressionConfig(method="hard", iou_threshold=0.5)
    assert suppress(found, hard).labels.tolist() == [0, 1]
    agnostic = SuppressionConfig(method="hard", iou_threshold=0.5, per_class=False)
    assert suppress(found, agnostic).labels.tolist() == [0]


def test_the_best_of_a_class_stays_even_below_the_smallest_score() -> None:
    found = detections((0, 10, 0.5, 0), (0, 9, 0.0004, 1), (20, 30, 0.0003, 1))
    ours = suppress(found, SuppressionConfig(min_score=0.001))
    assert ours.labels.tolist() == [0, 1]
    assert suppress(found, SuppressionConfig(method="hard", min_score=0.001)).labels.tolist() == [0]


def test_scores_of_zero_stay_when_no_smallest_score_is_asked_for() -> None:
    found = detections((0, 10, 0.5, 0), (20, 30, 0.0, 0), (0, 10, 0.4, 0))
    ours = suppress(found, SuppressionConfig(method="linear", iou_threshold=0.5, min_score=0.0))
    assert ours.scores.tolist() == pytest.approx([0.5, 0.0, 0.0], abs=1e-6)


def test_at_most_so_many_stay_the_best_ones() -> None:
    found = random_detections(200, num_classes=3, seed=0)
    everything, few = suppress(found, SuppressionConfig()), suppress(found, SuppressionConfig(max_per_video=7))
    assert len(few) == 7
    assert torch.equal(few.scores, everything.scores[:7])
    assert everything.num_cut == 0
    assert len(everything) - 7 <= (few.num_cut or 0) <= 193


def test_the_limit_may_grow_with_the_length() -> None:
    found = random_detections(200, num_classes=3, seed=0)
    minutes = (found.segments[:, 1].max() - found.segments[:, 0].min()).item() / 60
    config = SuppressionConfig(method="none", max_per_video=20, max_per_minute=40 / minutes - 1e-6)
    ours = suppress(found, config)
    assert (len(ours), ours.num_cut) == (40, 160)
    assert len(suppress(found, replace(config, max_per_minute=1e-3))) == 20  # never below the fixed limit
    assert len(suppress(detections(), config)) == 0


def test_without_suppression_detections_are_only_sorted_and_cut() -> None:
    found = detections((0, 1, 0.2, 0), (0, 1, 0.9, 1), (0, 1, 0.5, 0))
    ours = suppress(found, SuppressionConfig(method="none", max_per_video=2))
    assert ours.scores.tolist() == pytest.approx([0.9, 0.5])


def test_votes_are_the_mean_of_close_segments_by_score() -> None:
    # IoU of the first two is 8/12 < 0.7 and of the first and third 9/11 > 0.7.
    found = detections((0, 10, 0.6, 0), (2, 12, 0.5, 0), (1, 11, 0.3, 0))
    config = SuppressionConfig(per_class=False, voting_threshold=0.7)
    ours = suppress(found, config)
    first = (0.6 * 0 + 0.3 * 1) / 0.9
    assert ours.segments[0].tolist() == pytest.approx([first, 10 + first])
    by_overlap = suppress(found, SuppressionConfig(per_class=False, voting_threshold=0.7, weigh_votes_by_overlap=True))
    first = (0.3 * 9 / 11 * 1) / (0.6 + 0.3 * 9 / 11)
    assert by_overlap.segments[0].tolist() == pytest.approx([first, 10 + first])


def test_classes_vote_among_themselves() -> None:
    found = detections((0, 10, 0.6, 0), (1, 11, 0.3, 1), (1, 11, 0.2, 0), (40, 50, 0.1, 1))
    ours = suppress(found, SuppressionConfig(per_class=True, voting_threshold=0.7, min_score=0.0))
    found_as = list(zip(ours.labels.tolist(), ours.segments.tolist(), strict=True))
    by_label = {label: [segment for one, segment in found_as if one == label] for label in (0, 1)}
    # Of class 0 both are replaced by the same mean, 0.6 and 0.2 being its weights; class 1 has nobody else nearby.
    first = 0.2 * 1 / 0.8
    assert by_label[0] == [pytest.approx([first, 10 + first])] * 2
    assert by_label[1] == [[1, 11], [40, 50]]


def test_segments_nobody_votes_for_stay_as_they_are() -> None:
    found = detections((3, 3, 0.6, 0), (5, 9, 0.0, 0))
    ours = suppress(found, SuppressionConfig(per_class=False, voting_threshold=0.7, min_score=0.0))
    assert ours.segments.tolist() == [[3, 3], [5, 9]]


def test_nothing_in_nothing_out() -> None:
    for config in (SuppressionConfig(), SuppressionConfig(per_class=False, voting_threshold=0.7)):
        ours = suppress(detections(), config)
        assert ours.segments.shape == (0, 2)
        assert ours.labels.dtype == torch.int64
    hard = SuppressionConfig(method="hard", min_score=0.5)
    assert len(suppress(detections((0, 1, 0.4, 0)), hard)) == 0


def test_gradients_and_half_precision_do_not_get_in_the_way() -> None:
    found = detections((0, 10, 0.5, 0), (20, 30, 0.25, 0))
    scores = found.scores.to(torch.bfloat16).requires_grad_()
    ours = suppress(Detections(found.segments.double(), scores, found.labels), SuppressionConfig())
    assert ours.scores.tolist() == [0.5, 0.25]
    assert not ours.scores.requires_grad


def test_times_that_are_not_numbers_are_an_error() -> None:
    with pytest.raises(ValueError, match="NaN or infinite times or scores; look for a loss that diverged"):
        suppress(detections((0, math.nan, 0.5, 0)), SuppressionConfig())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "softest"}, r"suppression\.method is 'softest', .* known: \['gaussian', .*'none'\]"),
        ({"sigma": 0.0}, r"suppression\.sigma is 0\.0; give a positive number"),
        ({"max_per_video": 0}, r"suppression\.max_per_video is 0; give 1 or more"),
        ({"iou_threshold": 7.0}, r"suppression\.iou_threshold is 7\.0; give a number from 0 to 1"),
        ({"voting_threshold": 0.0}, r"suppression\.voting_threshold is 0\.0; give a number above 0, .* or null"),
        ({"min_score": float("nan")}, r"suppression\.min_score is nan; give 0 or more"),
        ({"max_per_minute": -1.0}, r"suppression\.max_per_minute is -1\.0; give a positive number"),
    ],
)
def test_settings_without_sense_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SuppressionConfig(**settings)
