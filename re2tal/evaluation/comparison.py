"""mAP with intervals, and the difference of two settings with a paired test, from `re2tal.evaluation.resampling`.

Both settings are scored on the same draws of videos, so that videos that are hard for both don't hide a difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from re2tal.evaluation.average_precision import mean_average_precision
from re2tal.evaluation.matching import Matches
from re2tal.evaluation.protocols import threshold_names
from re2tal.evaluation.resampling import LEVEL, Interval, centred, draw_maps, p_value
from re2tal.tables import text_table


@dataclass(frozen=True, slots=True)
class Spread:
    """The mAP of one setting; `str()` is a table in percent."""

    tiou_thresholds: tuple[float, ...]
    maps: np.ndarray
    """(R, T) of each run"""
    draws: np.ndarray
    """(draws, T), centred"""
    facts: str
    """What was scored."""

    def to_json(self) -> dict[str, Any]:
        """The figures, in types that `json` writes."""
        return {
            "draws": len(self.draws),
            "level": LEVEL,
            "average_map": [float(value) for value in self.maps.mean(axis=1)],
            "tiou": {
                name: {"map": mean, "interval": [interval.low, interval.high]}
                for name, mean, interval in self._values()
            },
        }

    def intervals(self) -> dict[str, Interval]:
        """tIoU, as reports call it, or "average" -> interval, from 0 to 1."""
        return {name: interval for name, _, interval in self._values()}

    def __str__(self) -> str:
        runs = len(self.maps)
        of_what = "videos" if runs == 1 else f"videos and of the {runs} runs"
        rows = [("tIoU", "mAP", f"{100 * LEVEL:.0f} % interval")]
        rows += [(name, f"{100 * mean:.2f}", str(interval)) for name, mean, interval in self._values()]
        lines = [f"mAP in % with intervals from {len(self.draws)} draws of {of_what}; {self.facts}"]
        if runs > 1:
            # ddof=1 just below: the runs are a sample of the seeds one might have taken.
            averages = 100 * self.maps.mean(axis=1)
            lines.append(
                f"average mAP of each run: {', '.join(f'{value:.2f}' for value in averages)}; their standard deviation "
                f"is {averages.std(ddof=1):.2f}"
            )
        return "\n".join([*lines, text_table(rows, align="<>", rules=(1, -1))])

    def _values(self) -> list[tuple[str, float, Interval]]:
        means = [*self.maps.mean(axis=0).tolist(), float(self.maps.mean())]
        intervals = map(Interval.of, [*self.draws.T, self.draws.mean(axis=1)])
        return list(zip((*threshold_names(self.tiou_thresholds), "average"), means, intervals, strict=True))


def spread_of(runs: Sequence[Matches], *, num_draws: int, seed: int) -> Spread:
    """Intervals of the mean mAP of `runs`, which differ only by their seed; errors as `draw_maps`."""
    draws = draw_maps([runs], num_draws=num_draws, seed=seed)[:, 0]
    reports = [mean_average_precision(run) for run in runs]
    maps = np.stack([one.map for one in reports])
    return Spread(
        reports[0].tiou_thresholds,
        maps,
        centred(draws, maps.mean(axis=0)),
        f"protocol {reports[0].protocol}; {reports[0].coverage.facts()}",
    )


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two settings, A and B; `str()` is a table in percent."""

    names: tuple[str, str]
    tiou_thresholds: tuple[float, ...]
    num_runs: tuple[int, int]
    maps: np.ndarray
    """(2, T) mean over the runs of each"""
    draws: np.ndarray
    """(draws, 2, T), centred"""
    facts: str
    """What was scored."""
    notes: tuple[str, ...]
    """What did not meet, by file."""

    def to_json(self) -> dict[str, Any]:
        """The figures, in types that `json` writes; a difference is B - A."""
        return {
            "a": self.names[0],
            "b": self.names[1],
            "runs": list(self.num_runs),
            "scored": self.facts,
            "draws": len(self.draws),
            "level": LEVEL,
            "tiou": {
                name: {"a": a, "b": b, "difference": b - a, "interval": [interval.low, interval.high], "p": p}
                for name, a, b, interval, p in self._values()
            },
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        rows = [("tIoU", "mAP of A", "mAP of B", "B - A", f"{100 * LEVEL:.0f} % interval", "p")]
        rows += [
            (name, f"{100 * a:.2f}", f"{100 * b:.2f}", f"{100 * (b - a):+.2f}", str(interval), f"{p:.4f}")
            for name, a, b, interval, p in self._values()
        ]
        runs = "" if max(self.num_runs) == 1 else f" and of {self.num_runs[0]} and {self.num_runs[1]} runs"
        lines = [
            *(f"{side}: {name}" for side, name in zip("AB", self.names, strict=True)),
            f"mAP in %; paired bootstrap, {len(self.draws)} draws of videos{runs}; p errs to the low side",
            self.facts,
            *(f"note: {note}" for note in self.notes),
        ]
        return "\n".join([*lines, text_table(rows, align="<>", rules=(1, -1))])

    def _values(self) -> list[tuple[str, float, float, Interval, float]]:
        first, second = (np.append(maps, maps.mean()).tolist() for maps in self.maps)
        # Draw by draw, not of two separate intervals: videos that are hard for both cancel out.
        draws = self.draws[:, 1] - self.draws[:, 0]
        columns = [*draws.T, draws.mean(axis=1)]
        rows = zip((*threshold_names(self.tiou_thresholds), "average"), first, second, columns, strict=True)
        return [(name, a, b, Interval.of(column), p_value(column)) for name, a, b, column in rows]


def compare_runs(
    a: Sequence[tuple[str, Matches]], b: Sequence[tuple[str, Matches]], *, num_draws: int, seed: int
) -> Comparison:
    """Two settings, each as the names and matches of its runs, on the same draws; errors as `draw_maps`."""
    draws = draw_maps([[run for _, run in runs] for runs in (a, b)], num_draws=num_draws, seed=seed)
    reports = [[mean_average_precision(run) for _, run in runs] for runs in (a, b)]
    named = zip([*a, *b], [*reports[0], *reports[1]], strict=True)
    first = reports[0][0]
    maps = np.stack([np.mean([one.map for one in of], axis=0) for of in reports])
    return Comparison(
        names=(", ".join(name for name, _ in a), ", ".join(name for name, _ in b)),
        tiou_thresholds=first.tiou_thresholds,
        num_runs=(len(a), len(b)),
        maps=maps,
        draws=centred(draws, maps),
        facts=f"protocol {first.protocol}; {first.coverage.facts()}",
        notes=tuple(f"{name}: {note}" for (name, _), one in named for note in one.coverage.notes()),
    )
