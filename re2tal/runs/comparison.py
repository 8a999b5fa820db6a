"""Compare two results files, or two settings with several seeds each, by a paired test over videos."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from re2tal.config import RunConfig, load_config
from re2tal.data.contract.shards import open_any, subset_folder
from re2tal.evaluation.comparison import Comparison, compare_runs
from re2tal.evaluation.ground_truth import read_ground_truth
from re2tal.evaluation.matching import Matches
from re2tal.evaluation.results import read_results
from re2tal.runs.evaluation import ScoringRules, is_class_agnostic, match_results
from re2tal.runs.folder import CONFIG_NAME
from re2tal.structures import VideoRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparisonOptions(ScoringRules):
    """By which rules both are scored, and how often videos are drawn."""

    draws: int = 1000
    """How often as many videos as there are are drawn, with replacement."""
    seed: int = 0
    """Of the draws: the same seed gives the same intervals."""
    seeds_of_a: tuple[Path, ...] = ()
    """More results of A's setting, with other seeds: means over runs are compared, and runs are drawn too."""
    seeds_of_b: tuple[Path, ...] = ()
    """The same for B."""


BY_DEFAULT = ComparisonOptions()


def compare(
    a: Path, b: Path, *, annotations: Path | None = None, options: ComparisonOptions = BY_DEFAULT
) -> Comparison:
    """The mAP of A and B, their difference, its interval and p.

    Where A lies in a run folder, the rules of that run count where no others are given, and without `annotations` its
    true actions. Raises ValueError, before anything is scored, if there is none, and as `re2tal.evaluate`.
    """
    sides = [(a, *options.seeds_of_a), (b, *options.seeds_of_b)]
    # All of them before anything is read: scoring takes minutes.
    if missing := [path for side in sides for path in side if not path.is_file()]:
        raise FileNotFoundError(f"{missing[0]} is not a file; give a results JSON")
    truths, source, options = _truths(a, annotations, options)

    def matched(paths: Sequence[Path]) -> list[tuple[str, Matches]]:
        return [(str(path), match_results(read_results(path), truths, options, files=(path, source))) for path in paths]

    return compare_runs(*map(matched, sides), num_draws=options.draws, seed=options.seed)


def _truths(
    a: Path, annotations: Path | None, options: ComparisonOptions
) -> tuple[Sequence[VideoRecord], Path, ComparisonOptions]:
    """The true actions, where they are from, and the options with what A's run says of those that are not given."""
    config_file = a.parent / CONFIG_NAME
    if not config_file.is_file():
        if annotations is not None:
            return read_ground_truth(annotations, subset=options.subset), annotations, options
        raise ValueError(
            f"{a} lies in no run folder (no {CONFIG_NAME} beside it), so what is true is not known; give "
            "--annotations FILE"
        )
    try:
        config = load_config(config_file)
    except ValueError as error:
        raise ValueError(f"{error} (it lies beside {a}, so its rules count; move {a.name} elsewhere if not)") from None
    subset = options.subset if options.subset != BY_DEFAULT.subset else config.data.validation_subset
    options = _as_in_run(options, config, a)
    if annotations is not None:
        return read_ground_truth(annotations, subset=subset), annotations, options
    folder = subset_folder(config.data.shards, subset)
    return [video.record for video in open_any(folder).videos], folder, options


def _as_in_run(options: ComparisonOptions, config: RunConfig, a: Path) -> ComparisonOptions:
    """`options`, with the rules of A's run where none are given."""
    rules, thresholds = config.evaluation, options.tiou_thresholds
    # A data set that was named has thresholds of its own.
    if thresholds is None and options.dataset == BY_DEFAULT.dataset:
        thresholds = rules.tiou_thresholds
    return replace(
        options,
        protocol=options.protocol if options.protocol != BY_DEFAULT.protocol else rules.protocol,
        blocked_videos=options.blocked_videos or rules.blocked_videos,
        tiou_thresholds=thresholds,
        class_agnostic=options.class_agnostic or is_class_agnostic(config, read_results(a)),
    )
