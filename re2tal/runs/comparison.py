"""Compare two results files, or two settings with several seeds each, by a paired test over videos."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from re2tal.config import RunConfig, load_config
from re2tal.data.contract.shards import open_any, subset_folder
from re2tal.evaluation.comparison import Comparison, compare_runs
from re2tal.evaluation.ground_truth import read_ground_truth
from re2tal.evaluation.matching import Matches
from re2tal.evaluation.protocols import Dataset, ProtocolName
from re2tal.evaluation.results import read_results
from re2tal.options import NOT_NEGATIVE, Range, check_options
from re2tal.runs.evaluation import ScoringRules, match_results, rules_of_run
from re2tal.runs.folder import CONFIG_NAME

_DRAWS = Range(lambda value: value >= 2, "at least 2 draws; customary are 1000")


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparisonOptions:
    """By which rules both are scored, and how often videos are drawn.

    A rule that is None is that of the run whose folder A lies in, and otherwise that of `ScoringRules`.
    """

    subset: str | None = None
    """Which subset of the annotations to score: that of A's run, or else validation."""
    protocol: ProtocolName | None = None
    """Whose rules count where the public evaluators differ: those of A's run, or else OpenTAD's."""
    dataset: Dataset | None = None
    """The data set whose customary thresholds to use, in place of those of A's run, or else of thumos14."""
    tiou_thresholds: tuple[float, ...] | None = None
    """Other thresholds than those."""
    blocked_videos: Path | None = None
    """Video ids to leave out of all files, in place of those of A's run: a JSON list, or a text file with one per
    line."""
    class_agnostic: bool = False
    """Score as if all labels, predicted and true, were one; so it is where A's run finds actions without a class."""
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

    Where A lies in a run folder, the rules of that run count where none are given, and without `annotations` its true
    actions. Raises ValueError, before anything is scored, if there is none, and as `re2tal.evaluate`.
    """
    check_options(options, draws=_DRAWS, seed=NOT_NEGATIVE)
    sides = [(a, *options.seeds_of_a), (b, *options.seeds_of_b)]
    # All of them before anything is read: scoring takes minutes.
    if missing := [path for side in sides for path in side if not path.is_file()]:
        raise FileNotFoundError(f"{missing[0]} is not a file; give a results JSON")
    config = _config_of_run(a)
    of_run = ScoringRules() if config is None else rules_of_run(config, read_results(a).classes)
    rules = _rules(options, otherwise=of_run)
    rules.check()
    if annotations is not None:
        truths, source = read_ground_truth(annotations, subset=rules.subset), annotations
    elif config is not None:
        source = subset_folder(config.data.shards, rules.subset)
        truths = [video.record for video in open_any(source).videos]
    else:
        raise ValueError(
            f"{a} lies in no run folder (no {CONFIG_NAME} beside it), so what is true is not known; give "
            "--annotations FILE"
        )

    def matched(paths: Sequence[Path]) -> list[tuple[str, Matches]]:
        return [(str(path), match_results(read_results(path), truths, rules, files=(path, source))) for path in paths]

    found = compare_runs(*map(matched, sides), num_draws=options.draws, seed=options.seed)
    if config is None:
        return found
    return replace(found, notes=(f"rules that are not given are those of {a.parent / CONFIG_NAME}", *found.notes))


def _config_of_run(a: Path) -> RunConfig | None:
    """The configuration of the run whose folder `a` lies in; None if it lies in none."""
    config_file = a.parent / CONFIG_NAME
    if not config_file.is_file():
        return None
    try:
        return load_config(config_file)
    except ValueError as error:
        raise ValueError(f"{error} (it lies beside {a}, so its rules count; move {a.name} elsewhere if not)") from None


def _rules(options: ComparisonOptions, *, otherwise: ScoringRules) -> ScoringRules:
    """The rules that are given, and the others as in `otherwise`."""
    given = {one.name: getattr(options, one.name) for one in fields(ScoringRules)}
    # A data set that is named has thresholds of its own.
    if options.dataset is not None:
        otherwise = replace(otherwise, tiou_thresholds=None)
    return replace(otherwise, **{name: value for name, value in given.items() if value not in (None, False)})
