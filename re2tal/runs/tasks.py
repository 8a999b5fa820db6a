"""The two kinds of run behind one face: what network is built, and what it is worth once it is trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from re2tal.config import RecognitionConfig, RunConfig, build_detector, build_recognizer
from re2tal.data.building.clips import true_classes
from re2tal.data.contract.shards import FeatureSet, ShardSet
from re2tal.data.streaming.stream import ClipStream
from re2tal.distributed import is_main
from re2tal.evaluation.accuracy import AccuracyReport, accuracy
from re2tal.evaluation.average_precision import MapReport, mean_average_precision
from re2tal.evaluation.ground_truth import as_one_class
from re2tal.evaluation.results import write_results
from re2tal.evaluation.video_classes import write_video_classes
from re2tal.inference import classify, predict
from re2tal.training.engine import Engine

AnyRun = RunConfig | RecognitionConfig


class Outcome(NamedTuple):
    """What a network made of the validation videos."""

    report: MapReport | AccuracyReport
    """To be printed."""
    figures: dict[str, float]
    """For metrics.jsonl."""
    summary: dict[str, Any]
    """For summary.json."""
    write: Callable[[Path], None]
    """Writes results.json: detections, or the probabilities of all classes."""


def build_model(run: AnyRun, classes: Sequence[str]) -> nn.Module:
    """The detector or recognizer for actions of `classes`, with the weights that the configuration names."""
    if isinstance(run, RunConfig):
        return build_detector(run, classes)
    recognizer, about_the_classifier = build_recognizer(run, classes)
    if is_main():
        print(about_the_classifier)
    return recognizer


def judge(engine: Engine, *, run: AnyRun, shards: ShardSet | FeatureSet, clips: ClipStream) -> Outcome:
    """Every rank calls this: what the network finds in all videos of `shards`, and how right it is."""
    if isinstance(run, RunConfig):
        return _judge_detector(engine, run, shards, clips)
    return _judge_recognizer(engine, shards, clips)


def _judge_detector(engine: Engine, run: RunConfig, shards: ShardSet | FeatureSet, clips: ClipStream) -> Outcome:
    predictions = predict(engine, clips.epoch(0), suppression=run.suppression, device=engine.device)
    classes = engine.module.localizer.classes
    truth = [video.record for video in shards.videos]
    if run.localizer.class_agnostic:
        truth = as_one_class(truth, label=classes[0])
    report = mean_average_precision(
        predictions,
        truth,
        classes=classes,
        protocol=run.evaluation.protocol,
        tiou_thresholds=run.evaluation.tiou_thresholds,
    )
    return Outcome(
        report,
        {"average_map": report.average_map, **{f"map/{tiou}": value for tiou, value in report.map_by_tiou.items()}},
        {
            "average_map": report.average_map,
            "map": report.map_by_tiou,
            "protocol": run.evaluation.protocol,
            "videos": len(predictions),
        },
        partial(write_results, predictions=predictions, classes=classes),
    )


def _judge_recognizer(engine: Engine, shards: ShardSet | FeatureSet, clips: ClipStream) -> Outcome:
    scores = classify(engine, clips.epoch(0), device=engine.device)
    classes = engine.module.classes
    report = accuracy(scores, true_classes(shards), classes=classes)
    shares = {"top1": report.top1, "top5": report.top5, "mean_class_accuracy": report.mean_class_accuracy}
    return Outcome(
        report, shares, {**shares, "videos": len(scores)}, partial(write_video_classes, scores=scores, classes=classes)
    )
