"""The two kinds of run behind one interface: builds the network, and scores it once it is trained."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from re2tal.backbones import plain_start
from re2tal.config import AnyRun, RunConfig, build_detector, build_recognizer
from re2tal.data.building.clips import true_classes
from re2tal.data.contract.shards import FeatureSet, ShardSet
from re2tal.distributed import is_main
from re2tal.evaluation.accuracy import AccuracyReport, accuracy
from re2tal.evaluation.average_precision import MapReport, mean_average_precision
from re2tal.evaluation.ground_truth import as_one_class
from re2tal.evaluation.matching import Matches
from re2tal.evaluation.results import read_results, write_results
from re2tal.evaluation.video_classes import read_video_classes, write_video_classes
from re2tal.inference import classify, predict
from re2tal.runs.evaluation import match_by, rules_of_run
from re2tal.structures import Batch, Detections, VideoRecord
from re2tal.training.trackers import Figures

if TYPE_CHECKING:  # what reads a trained model needs no DeepSpeed
    from re2tal.training.deepspeed_import import Engine

DRAWN_VIDEOS = 3
"""Validation videos whose timelines are drawn for trackers: the first that have actions."""


class Outcome(NamedTuple):
    """Predictions of a network for the validation videos, and their scores."""

    report: MapReport | AccuracyReport
    """The scores; `str()` is a table."""
    figures: dict[str, float]
    """For metrics.jsonl."""
    summary: dict[str, Any]
    """For summary.json."""
    write: Callable[..., None]
    """Writes results.json, given its path and maybe a note: detections, or the probabilities of all classes."""
    pictures: Callable[[], Figures] = dict
    """Draws what trackers show: precision-recall curves, and timelines of a few videos."""

    @property
    def merit(self) -> tuple[str, float]:
        """The figure by which one network is better than another: average mAP, or top-1 accuracy."""
        return next(iter(self.figures.items()))


def build_model(config: AnyRun, classes: Sequence[str]) -> nn.Module:
    """The detector or recognizer for actions of `classes`, with the weights that the configuration names."""
    first_beta = config.annealing.start if config.annealing.epochs > 0 else None
    if is_main() and (warning := plain_start(config.backbone, first_beta=first_beta)) is not None:
        print(f"warning: {warning}", file=sys.stderr, flush=True)
    if isinstance(config, RunConfig):
        return build_detector(config, classes)
    recognizer, about_the_classifier = build_recognizer(config, classes)
    if is_main():
        print(about_the_classifier, file=sys.stderr, flush=True)
    return recognizer


def judge(engine: Engine, *, config: AnyRun, shards: ShardSet | FeatureSet, batches: Iterable[Batch]) -> Outcome:
    """Every rank calls this: predicts all videos of `shards`, each rank its `batches`, and scores them."""
    if isinstance(config, RunConfig):
        predictions = predict(engine, batches, suppression=config.suppression, device=engine.device)
        return _of_detector(predictions, engine.module.localizer.classes, config, shards)
    return _of_recognizer(classify(engine, batches, device=engine.device), engine.module.classes, shards)


def judge_again(results: Path, *, config: AnyRun, shards: ShardSet | FeatureSet) -> Outcome:
    """Scores what `Outcome.write` wrote."""
    if isinstance(config, RunConfig):
        found = read_results(results)
        return _of_detector(found.predictions, found.classes, config, shards)
    classified = read_video_classes(results)
    return _of_recognizer(classified.scores, classified.classes, shards)


def _of_detector(
    predictions: Mapping[str, Detections], classes: Sequence[str], config: RunConfig, shards: ShardSet | FeatureSet
) -> Outcome:
    records = [video.record for video in shards.videos]
    rules = rules_of_run(config, classes)
    matches = match_by(rules, predictions, records, classes)
    scores = mean_average_precision(matches)
    drawn = as_one_class(records) if rules.class_agnostic else records
    return Outcome(
        scores,
        {"average_map": scores.average_map, **{f"map/{tiou}": value for tiou, value in scores.map_by_tiou.items()}},
        {
            "average_map": scores.average_map,
            "map": scores.map_by_tiou,
            "protocol": rules.protocol,
            "subset": scores.coverage.subset,
            "class_agnostic": rules.class_agnostic,
            "videos": scores.coverage.num_videos,
            "scored": scores.coverage.facts(),
            "notes": scores.coverage.notes(),
        },
        partial(write_results, predictions=predictions, classes=classes),
        partial(_pictures, matches, drawn, predictions, classes),
    )


def _pictures(
    matches: Matches, records: Sequence[VideoRecord], predictions: Mapping[str, Detections], classes: Sequence[str]
) -> Figures:
    # Imported late: matplotlib takes a second, and most ranks draw nothing.
    from re2tal.reporting.precision_recall import draw_precision_recall
    from re2tal.reporting.timelines import draw_timeline

    # By id, so that every evaluation draws the same videos.
    shown = sorted(
        (one for one in records if one.actions and one.video_id in predictions), key=lambda one: one.video_id
    )
    timelines = {
        f"timeline/{number}": draw_timeline(one, predictions[one.video_id], classes=classes)
        for number, one in enumerate(shown[:DRAWN_VIDEOS], start=1)
    }
    return {"precision_recall": draw_precision_recall(matches), **timelines}


def _of_recognizer(scores: Mapping[str, Tensor], classes: Sequence[str], shards: ShardSet | FeatureSet) -> Outcome:
    scored = accuracy(scores, true_classes(shards), classes=classes)
    shares = {"top1": scored.top1, "top5": scored.top5, "mean_class_accuracy": scored.mean_class_accuracy}
    return Outcome(
        scored, shares, {**shares, "videos": len(scores)}, partial(write_video_classes, scores=scores, classes=classes)
    )
