"""Score detections against annotations, and class scores against shards of trimmed clips."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from re2tal.config import RunConfig
from re2tal.data.building.annotations import read_video_ids
from re2tal.data.building.clips import true_classes
from re2tal.data.contract.shards import open_shards
from re2tal.evaluation.accuracy import AccuracyReport, accuracy
from re2tal.evaluation.average_precision import MapReport, mean_average_precision
from re2tal.evaluation.comparison import Spread, spread_of
from re2tal.evaluation.coverage import Coverage
from re2tal.evaluation.error_analysis import ErrorReport, analyse_errors
from re2tal.evaluation.ground_truth import ANY_CLASS, as_one_class, read_ground_truth, read_subsets, without_duration
from re2tal.evaluation.matching import Matches, match_predictions
from re2tal.evaluation.protocols import TIOU_THRESHOLDS, Dataset, EvaluationConfig, ProtocolName, check_thresholds
from re2tal.evaluation.recall import RecallReport, average_recall, top_kx_recall
from re2tal.evaluation.results import Results, read_results
from re2tal.evaluation.video_classes import read_video_classes
from re2tal.localizers.class_map import AGNOSTIC_CLASS
from re2tal.options import COUNT, NOT_NEGATIVE, Range, check_options
from re2tal.structures import Detections, VideoRecord

_NO_DRAWS_OR_MORE = Range(lambda value: value == 0 or value >= 2, "at least 2 draws, customary are 1000, or 0 for none")


@dataclass(frozen=True, slots=True)
class Evaluated:
    """The scores of a results file."""

    precision: MapReport
    """Mean average precision, by class and by temporal IoU."""
    recall: RecallReport | None
    """Average recall of proposals, where it was asked for."""
    top_kx: Mapping[int, Mapping[str, float]] = field(default_factory=dict)
    """k -> tIoU -> recall of the best k x detections of a class in a video that shows it x times, if asked for."""

    errors: ErrorReport | None = None
    """Where mAP is lost, if asked for."""
    spread: Spread | None = None
    """Intervals of the mAP, if asked for."""
    note: str | None = None
    """What the results file says of itself."""

    @property
    def average_map(self) -> float:
        """The mean of the mAP over all thresholds, from 0 to 1."""
        return self.precision.average_map

    def __str__(self) -> str:
        facts = self.precision.coverage.facts()
        lines = [str(self.precision)]
        if self.top_kx or self.recall is not None:
            lines.append(f"\nrecall in %; protocol {self.precision.protocol}; {facts}")
        for k, recalls in self.top_kx.items():
            lines.append(f"Recall@{k}x " + "   ".join(f"{tiou}: {100 * value:.2f}" for tiou, value in recalls.items()))
        if self.recall is not None:
            lines.append(str(self.recall))
        if self.spread is not None:
            lines.append(f"\n{self.spread}")
        if self.errors is not None:
            lines = [f"errors as DETAD counts them; {facts}", f"{self.errors}\n", *lines]
        if self.note is not None:
            lines.append(f"note: {self.note}")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """The figures as JSON values."""
        recall = {} if self.recall is None else {"recall": self.recall.to_json()}
        top_kx = {"recall_at_kx": self.top_kx} if self.top_kx else {}
        errors = {} if self.errors is None else {"errors": self.errors.to_json()}
        spread = {} if self.spread is None else {"bootstrap": self.spread.to_json()}
        note = {} if self.note is None else {"note": self.note}
        return {**self.precision.to_json(), **top_kx, **recall, **errors, **spread, **note}


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoringRules:
    """By which rules detections are scored."""

    subset: str = "validation"
    """Which subset of the annotations to score."""
    protocol: ProtocolName = "opentad"
    """Whose rules count where the public evaluators differ: OpenTAD's or ActivityNet's."""
    dataset: Dataset = "thumos14"
    """The data set whose customary thresholds to use."""
    tiou_thresholds: tuple[float, ...] | None = None
    """Other thresholds than those."""
    blocked_videos: Path | None = None
    """Video ids to leave out of all files: a JSON list, or a text file with one per line."""
    class_agnostic: bool = False
    """Score as if all labels, predicted and true, were one."""

    def check(self) -> None:
        """ValueError for a number that means nothing."""
        if self.tiou_thresholds is not None:
            check_thresholds(self.tiou_thresholds)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoringOptions(ScoringRules):
    """What of the detections is scored, and by which rules."""

    proposals: int | None = None
    """Also give the average recall (AR@AN) with up to so many detections per video, whatever their class, and the area
    under its curve (AUC); ActivityNet takes 100."""
    top_kx: tuple[int, ...] = ()
    """Also give the recall of the best k x detections of each class in a video that shows it x times, for each k; Ego4D
    reports k = 1."""
    errors: bool = False
    """Also show where mAP is lost, as DETAD does: types of wrong predictions, mAP and missed actions by length,
    coverage and number of actions in the video."""
    bootstrap: int = 0
    """Also give 95 % intervals of the mAP from so many draws of videos, such as 1000."""
    seeds: tuple[Path, ...] = ()
    """Results of the same setting with other seeds: also give the mean of all runs, and draw runs as well as videos.
    Needs --bootstrap."""
    bootstrap_seed: int = 0
    """Of the draws: the same seed gives the same intervals."""

    def check(self) -> None:
        """ValueError for a number that means nothing."""
        ScoringRules.check(self)
        check_options(self, proposals=COUNT, top_kx=COUNT, bootstrap=_NO_DRAWS_OR_MORE, bootstrap_seed=NOT_NEGATIVE)


AS_USUAL = ScoringOptions()


def evaluate(predictions: Path | str, annotations: Path | str, options: ScoringOptions = AS_USUAL) -> Evaluated:
    """Score a results JSON against an annotation JSON, both in ActivityNet's layout.

    The printed table and the JSON count and name videos and labels that only one of the two files has. Ids that differ
    only by a video file's suffix or a `v_` in front are matched where that is unambiguous. ValueError if nothing
    matches.

    Example:
        scored = re2tal.evaluate("runs/demo/results.json", "demo/annotations.json")
        print(scored)
        print(f"{100 * scored.average_map:.2f} %")
    """
    options.check()
    if options.seeds and not options.bootstrap:
        raise ValueError(f"seeds, {options.seeds[0]}, were given without bootstrap; give it too, such as 1000")
    truths = read_ground_truth(Path(annotations), subset=options.subset)
    results = read_results(Path(predictions))
    matches = match_results(results, truths, options, files=(predictions, annotations))
    precision = mean_average_precision(matches)
    # After the first, whose errors are the ones to see first.
    seeds = [match_results(read_results(path), truths, options, files=(path, annotations)) for path in options.seeds]
    classes = results.classes
    if options.class_agnostic:
        # Matches have done it for themselves; recall and errors take what is here.
        truths, classes = as_one_class(truths), (ANY_CLASS,) * len(classes)
    scored = results.predictions, truths
    shared: dict[str, Any] = {"classes": classes, "blocked_videos": blocked_by(options)}
    by_rules = {**shared, "protocol": options.protocol}
    thresholds = precision.tiou_thresholds
    recall = top_kx = errors = spread = None
    if options.proposals is not None:
        recall = average_recall(*scored, proposals_per_video=options.proposals, **by_rules)
    if options.top_kx:
        top_kx = top_kx_recall(*scored, tiou_thresholds=thresholds, top_k=options.top_kx, **by_rules)
    if options.errors:
        # DETAD has two sets of bins for lengths; these data sets have videos and actions like ActivityNet's.
        sizes_of: Literal["activitynet", "thumos14"] = (
            "activitynet" if options.dataset in ("activitynet", "hacs", "fineaction") else "thumos14"
        )
        errors = analyse_errors(
            *scored,
            tiou_thresholds=thresholds,
            sizes_of=sizes_of,
            without_duration=without_duration(Path(annotations)),
            **shared,
        )
    if options.bootstrap:
        spread = spread_of([matches, *seeds], num_draws=options.bootstrap, seed=options.bootstrap_seed)
    names = list(precision.map_by_tiou)
    columns = [] if top_kx is None else [dict(zip(names, column, strict=True)) for column in top_kx.T.tolist()]
    by_k = dict(zip(options.top_kx, columns, strict=True))
    return Evaluated(precision, recall, by_k, errors, spread, results.note)


def rules_of_run(config: RunConfig, classes: Sequence[str]) -> ScoringRules:
    """By which a run scores results of these classes: as of one class, but where a classifier of whole videos named
    them."""
    rules = config.evaluation
    return ScoringRules(
        subset=config.data.validation_subset,
        protocol=rules.protocol,
        tiou_thresholds=rules.tiou_thresholds,
        blocked_videos=rules.blocked_videos,
        class_agnostic=config.localizer.class_agnostic and set(classes) <= {AGNOSTIC_CLASS},
    )


def match_by(
    rules: ScoringRules, predictions: Mapping[str, Detections], truths: Sequence[VideoRecord], classes: Sequence[str]
) -> Matches:
    """Predictions against truths; `mean_average_precision` scores them."""
    return match_predictions(
        predictions,
        truths,
        classes=classes,
        protocol=rules.protocol,
        tiou_thresholds=rules.tiou_thresholds or TIOU_THRESHOLDS[rules.dataset],
        blocked_videos=blocked_by(rules),
        class_agnostic=rules.class_agnostic,
    )


def check_truths(truths: Sequence[VideoRecord], config: RunConfig, *, classes: Sequence[str]) -> None:
    """ValueError where predictions of a detector for `classes` could not be scored by the rules of its run: nothing
    true counts, or a class has no truth and the protocol refuses that."""
    rules = match_by(rules_of_run(config, classes), {}, truths, classes)
    if config.localizer.class_agnostic or not rules.protocol.refuses_unknown_labels:
        return
    if without := sorted(set(classes) - set(rules.truths.classes)):
        raise ValueError(
            f"evaluation.protocol is {rules.protocol.name!r}, which refuses predictions of classes that no video of "
            f"the subset shows, such as {without[0]!r}; set it to 'opentad', which ignores them"
        )


def match_results(
    results: Results, truths: Sequence[VideoRecord], rules: ScoringRules, *, files: tuple[Path | str, Path | str]
) -> Matches:
    """Results against truths; `files` are where both come from, for the ValueError if nothing matches."""
    matches = match_by(rules, results.predictions, truths, results.classes)
    _check_match(matches.predictions.coverage, *files)
    return matches


def blocked_by(rules: ScoringRules | EvaluationConfig) -> frozenset[str]:
    """The videos to leave out; ValueError for a file that is no list of them."""
    return read_video_ids(Path(rules.blocked_videos)) if rules.blocked_videos else frozenset()


def _check_match(coverage: Coverage, predictions: Path | str, annotations: Path | str) -> None:
    """Raises ValueError where predictions and annotations have no video, or no label, in common."""
    try:
        coverage.check()
    except ValueError as error:
        subsets = read_subsets(Path(annotations)) if Path(annotations).is_file() else {}
        # The commonest mistake: results of one subset, scored against another.
        elsewhere = Counter(subsets[one] for one in coverage.unknown_videos if one in subsets)
        hint = "".join(f"; {number} of these videos are in subset {name!r}" for name, number in elsewhere.items())
        raise ValueError(f"{predictions} and {annotations} do not match: {error}{hint}") from None


def evaluate_recognizer(predictions: Path, shards: Path) -> AccuracyReport:
    """Score a recognizer's results JSON against shards of trimmed clips."""
    found, truth = read_video_classes(predictions), true_classes(open_shards(shards))
    return accuracy(found.scores, truth, classes=found.classes)
