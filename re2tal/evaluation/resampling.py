"""How far a mAP may be trusted: bootstrap over videos, and over runs that differ only by their seed.

A mAP is no mean over videos, so each draw takes as many videos as there are, with replacement, and computes the mAP of
these. Matches stay inside videos, so they are found once; a video that was drawn w times counts w times:

    AP = sum over true positives of  w x (highest precision at this rank or a later one) / sum of w over truths

which is the AP of a ground truth that lists the video w times under w names. Classes without a truth in a draw are left
out of its mean. Several runs are drawn with replacement too, and their mAPs averaged. Source: Efron & Tibshirani, An
Introduction to the Bootstrap, 1993, chapters 13 and 16.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from re2tal.evaluation.matching import Matches

LEVEL = 0.95
"""Of all intervals."""


@dataclass(frozen=True, slots=True)
class WeightedMap:
    """The mAP of weighted videos. P: predictions of known classes, M: true positives, by threshold and class."""

    owners: np.ndarray
    """(P,) video of each prediction, class by class and best first; the last index is "not in the subset\""""
    first_of_class: np.ndarray
    """(K,) first prediction of each class"""
    ranks: np.ndarray
    """(M,) index into `owners`"""
    groups: np.ndarray
    """(M,) threshold * K + class, not decreasing"""
    truth_owners: np.ndarray
    """(all truths,) video of each"""
    truth_labels: np.ndarray
    """(all truths,) class of each"""
    num_thresholds: int

    @classmethod
    def of(cls, matches: Matches) -> WeightedMap:
        """What is needed of `matches`, in the order that `maps` reads it."""
        truths, num_classes = matches.truths, len(matches.truths.classes)
        counts = np.array([len(rows) for rows in matches.ranked])
        # Row by row, as nonzero gives them, groups do not decrease: thresholds outside, classes and ranks inside.
        found = np.concatenate(matches.partners, axis=1) >= 0
        thresholds, ranks = np.nonzero(found)
        place = {video_id: index for index, video_id in enumerate(truths.scored)}
        owners = matches.predictions.owners[np.concatenate(matches.ranked)]
        return cls(
            # Not -1, which would index the last video's weight.
            owners=np.where(owners < 0, len(truths.scored), owners),
            first_of_class=np.cumsum(counts) - counts,
            ranks=ranks,
            groups=thresholds * num_classes + np.repeat(np.arange(num_classes), counts)[ranks],
            truth_owners=np.array([place[video_id] for video_id in truths.video_ids])[truths.videos],
            truth_labels=truths.labels,
            num_thresholds=len(matches.thresholds),
        )

    def maps(self, weights: np.ndarray) -> np.ndarray:
        """(V,) how often each scored video counts -> (T,) mAP; NaN if no drawn video has a truth."""
        num_classes = len(self.first_of_class)
        num_groups = self.num_thresholds * num_classes
        # Predictions for videos outside the subset are false in every draw.
        by_rank = np.append(weights, 1)[self.owners]
        seen = np.concatenate([[0], np.cumsum(by_rank)])
        weight = by_rank[self.ranks]
        num_seen = seen[self.ranks + 1] - seen[self.first_of_class][self.groups % num_classes]
        found = np.cumsum(weight)
        sizes = np.bincount(self.groups, minlength=num_groups)
        before = np.concatenate([[0], found])[np.cumsum(sizes) - sizes]
        # A video that was not drawn weighs 0; before the first drawn one nothing was seen, and 0 / 1 is 0.
        precision = (found - before[self.groups]) / np.maximum(num_seen, 1)
        # One running maximum from the right serves all groups: the key of each is above those to its right.
        key = precision + 2.0 * (num_groups - self.groups)
        envelope = np.maximum.accumulate(key[::-1])[::-1] - 2.0 * (num_groups - self.groups)
        sums = np.bincount(self.groups, weights=weight * envelope, minlength=num_groups)
        truths = np.bincount(self.truth_labels, weights=weights[self.truth_owners], minlength=num_classes)
        there = truths > 0
        if not there.any():
            return np.full(self.num_thresholds, np.nan)
        return (sums.reshape(self.num_thresholds, num_classes)[:, there] / truths[there]).mean(axis=1)


@dataclass(frozen=True, slots=True)
class Interval:
    """A percentile interval at LEVEL."""

    low: float
    high: float

    @classmethod
    def of(cls, draws: np.ndarray) -> Interval:
        """Of (draws,) values."""
        # Percentiles, not the mean and a standard deviation: a mAP near 0 or 1 has a lopsided distribution.
        low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return cls(float(low), float(high))

    def __str__(self) -> str:
        return f"[{100 * self.low:.2f}, {100 * self.high:.2f}]"


def centred(draws: np.ndarray, values: np.ndarray) -> np.ndarray:
    """(draws, ...) moved so that their mean is `values` (...).

    A mAP of few videos is too high on average, and that of a draw, with even fewer different ones, higher still: by
    0.03 for 200 videos of 20 classes in a simulation, where 91 % of these intervals then held the mean over test sets
    of 200 videos (without this step 90 %, and most estimates lay at the lower end).
    """
    return draws + (values - draws.mean(axis=0))


def draw_maps(groups: Sequence[Sequence[Matches]], *, num_draws: int, seed: int) -> np.ndarray:
    """(draws, G, T) mAP of G groups of runs; in each draw all runs are scored on the same videos.

    A group holds the runs of one setting. ValueError for less than 2 draws, and for runs that were scored against
    different videos.
    """
    if num_draws < 2:
        raise ValueError(f"bootstrap is {num_draws}; give at least 2 draws, customary are 1000")
    if seed < 0:
        raise ValueError(f"the seed of the bootstrap is {seed}; give 0 or more")
    scored = groups[0][0].truths.scored
    if any(run.truths.scored != scored for runs in groups for run in runs):
        raise ValueError("the runs were not scored against the same videos; give all the same annotations and subset")
    # One generator for all: videos and then runs are drawn in each turn, also in one that is thrown away, so that a
    # seed always gives the same draws.
    generator = np.random.default_rng(seed)
    weighted = [[WeightedMap.of(run) for run in runs] for runs in groups]
    draws: list[list[np.ndarray]] = []
    while len(draws) < num_draws:
        weights = np.bincount(generator.integers(len(scored), size=len(scored)), minlength=len(scored))
        chosen = [np.bincount(generator.integers(len(runs), size=len(runs)), minlength=len(runs)) for runs in weighted]
        # A draw of videos that have no truth has no mAP, and is drawn again; which videos these are is common to all.
        if weights[weighted[0][0].truth_owners].any():
            draws.append([_mean_map(runs, often, weights) for runs, often in zip(weighted, chosen, strict=True)])
    return np.array(draws)


def _mean_map(runs: Sequence[WeightedMap], often: np.ndarray, weights: np.ndarray) -> np.ndarray:
    # A run that was not drawn need not be scored.
    maps = [count * run.maps(weights) for run, count in zip(runs, often, strict=True) if count]
    return np.sum(maps, axis=0) / often.sum()


def p_value(differences: np.ndarray) -> float:
    """Two-sided, of (draws,) differences: twice the share of draws on the other side of 0, at most 1.

    One draw is added to both, so that no finite number of draws proves anything. In a simulation of 200 videos and 20
    classes, 11 % of 150 comparisons of equally good detectors had p < 0.05: it errs to the low side. Source: Davison &
    Hinkley, Bootstrap Methods and their Application, 1997, section 4.2.
    """
    on_a_side = min((differences <= 0).sum(), (differences >= 0).sum())
    return float(min(1.0, 2 * (1 + on_a_side) / (1 + len(differences))))
