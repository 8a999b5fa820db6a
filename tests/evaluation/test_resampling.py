"""Bootstrap of mAP: a video drawn twice is the same as two videos, and the test of a difference knows chance."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from re2tal.evaluation.average_precision import mean_average_precision
from re2tal.evaluation.comparison import compare_runs, spread_of
from re2tal.evaluation.matching import Matches, match_predictions
from re2tal.evaluation.resampling import Interval, WeightedMap, draw_maps, p_value
from re2tal.structures import Action, Detections, VideoRecord

CLASSES = ("jump", "run", "swim", "never")
RULES = {"classes": CLASSES, "protocol": "opentad", "tiou_thresholds": (0.3, 0.5, 0.7)}


def truths_of(num_videos: int, random: np.random.Generator) -> list[VideoRecord]:
    """Videos with up to three actions; the fourth has none."""
    records = []
    for video in range(num_videos):
        starts = random.uniform(0, 80, size=0 if video == 3 else random.integers(1, 4))
        labels = random.integers(3, size=len(starts))
        rows = zip(starts.tolist(), labels.tolist(), strict=True)
        actions = tuple(Action(start, start + 8, CLASSES[label]) for start, label in rows)
        records.append(VideoRecord(f"v{video}", "validation", 100.0, actions))
    return records


def found_in(records: list[VideoRecord], random: np.random.Generator, *, noise: float) -> dict[str, Detections]:
    """The true actions, off by some noise, and false ones; also in a video that is not in the subset."""
    found = {}
    for record in records:
        rows = [(one.start_seconds, one.end_seconds, CLASSES.index(one.label)) for one in record.actions]
        false = [(start, start + 8, int(random.integers(4))) for start in random.uniform(0, 80, size=3)]
        table = torch.tensor([*rows, *false], dtype=torch.float64)
        table[:, :2] += torch.from_numpy(random.normal(0, noise, size=(len(table), 2)))
        found[record.video_id] = Detections(
            table[:, :2], torch.from_numpy(random.random(len(table))), table[:, 2].long()
        )
    return found | {"elsewhere": found["v0"]}


def matched(seed: int, *, num_videos: int = 12, noise: float = 1.0) -> tuple[Matches, dict, list[VideoRecord]]:
    random = np.random.default_rng(seed)
    records = truths_of(num_videos, random)
    found = found_in(records, random, noise=noise)
    return match_predictions(found, records, **RULES), found, records


@pytest.mark.parametrize("seed", range(3))
def test_a_video_that_counts_twice_is_two_videos(seed: int) -> None:
    matches, found, records = matched(seed)
    weights = np.random.default_rng(seed + 10).integers(4, size=len(records))
    copies = [(copy, record) for record, often in zip(records, weights, strict=True) for copy in range(often)]
    # Copies stand side by side, so that the stable order of their equal scores keeps a prediction's copies together.
    doubled = [replace(record, video_id=f"{record.video_id}-{copy}") for copy, record in copies]
    again = {f"{record.video_id}-{copy}": found[record.video_id] for copy, record in copies}
    expected = mean_average_precision(match_predictions(again | {"elsewhere": found["elsewhere"]}, doubled, **RULES))
    ours = WeightedMap.of(matches).maps(weights)
    np.testing.assert_allclose(ours, expected.map, rtol=0, atol=1e-11)


def test_all_videos_once_give_the_map_itself() -> None:
    matches, found, records = matched(0)
    ours = WeightedMap.of(matches).maps(np.ones(len(records), dtype=int))
    np.testing.assert_allclose(
        ours, mean_average_precision(match_predictions(found, records, **RULES)).map, rtol=0, atol=1e-11
    )


def test_the_same_seed_draws_the_same_videos_for_all_runs() -> None:
    matches, _, _ = matched(0)
    draws = draw_maps([[matches], [matches]], num_draws=20, seed=3)
    np.testing.assert_array_equal(draws[:, 0], draws[:, 1])
    np.testing.assert_array_equal(draws, draw_maps([[matches], [matches]], num_draws=20, seed=3))
    assert draws.std() > 0
    assert p_value(np.diff(draws.mean(axis=2), axis=1)[:, 0]) == 1.0


def test_runs_are_drawn_too() -> None:
    matches, found, records = matched(0)
    worse = {video: replace(one, segments=one.segments + 4) for video, one in found.items()}
    other = match_predictions(worse, records, **RULES)
    alone, both = (spread_of(runs, num_draws=100, seed=0) for runs in ([matches], [matches, other]))
    assert both.maps.shape == (2, 3)
    assert both.draws.std() > 1.2 * alone.draws.std()
    assert "average mAP of each run: " in str(both)


def test_a_real_difference_is_told_from_chance() -> None:
    random = np.random.default_rng(0)
    records = truths_of(60, random)
    good, also_good, bad = (
        ("x", match_predictions(found_in(records, random, noise=noise), records, **RULES)) for noise in (0.8, 0.8, 2.5)
    )
    real = compare_runs([good], [bad], num_draws=200, seed=0).to_json()["tiou"]["average"]
    assert real["difference"] < 0
    assert real["interval"][1] < 0
    assert real["p"] == pytest.approx(2 / 201)  # no draw on the other side, and one added
    chance = compare_runs([good], [also_good], num_draws=200, seed=0).to_json()["tiou"]["average"]
    assert chance["interval"][0] < 0 < chance["interval"][1]
    assert chance["p"] > 0.05


def test_worked_by_hand() -> None:
    assert p_value(np.array([1.0, 1.0, -1.0, 1.0])) == pytest.approx(2 * 2 / 5)
    interval = Interval.of(np.arange(1001.0))
    assert (interval.low, interval.high) == pytest.approx((25.0, 975.0))


def test_too_few_draws_and_other_videos_are_refused() -> None:
    matches, _, _ = matched(0)
    other, _, _ = matched(0, num_videos=13)
    with pytest.raises(ValueError, match="bootstrap is 1; give at least 2 draws"):
        draw_maps([[matches]], num_draws=1, seed=0)
    with pytest.raises(ValueError, match="not scored against the same videos"):
        draw_maps([[matches], [other]], num_draws=5, seed=0)
