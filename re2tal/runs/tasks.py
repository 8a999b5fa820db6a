"""The two kinds of run behind one interface: builds the network, and scores it once it is trained."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from re2tal.backbones import plain_start
from re2tal.config import RecognitionConfig, RunConfig, build_detector, build_recognizer
from re2tal.data.building.clips import true_classes
from re2tal.data.contract.shards import FeatureSet, ShardSet
from re2tal.distributed import is_main
from re2tal.evaluation.accuracy import AccuracyReport, accuracy
from re2tal.evaluation.average_precision import MapReport, mean_average_precision
from re2tal.evaluation.results import write_results
from re2tal.evaluation.video_classes import write_video_classes
from re2tal.inference import classify, predict
from re2tal.structures import Batch

if TYPE_CHECKING:  # what reads a trained model needs no DeepSpeed
    from re2tal.training.deepspeed_import import Engine

AnyRun = RunConfig | RecognitionConfig


class Outcome(NamedTuple):
    """Predictions of a network for the validation videos, and their scores."""

    report: MapReport | AccuracyReport
    """The scores; `str()` is a table."""
    figures: dict[str, float]
    """For metrics.jsonl."""
    summary: dict[str, Any]
    """For summary.json."""
    write: Callable[[Path], None]
    """Writes results.json: detections, or the probabilities of all classes."""


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
        return _judge_detector(engine, config, shards, batches)
    return _judge_recognizer(engine, shards, batches)


def _judge_detector(
    engine: Engine, config: RunConfig, shards: ShardSet | FeatureSet, batches: Iterable[Batch]
) -> Outcome:
    predictions = predict(engine, batches, suppression=config.suppression, device=engine.device)
    classes = engine.module.localizer.classes
    report = mean_average_precision(
        predictions,
        [video.record for video in shards.videos],
        classes=classes,
        protocol=config.evaluation.protocol,
        tiou_thresholds=config.evaluation.tiou_thresholds,
        class_agnostic=config.localizer.class_agnostic,
        max_per_video=config.suppression.max_per_video,
    )
    return Outcome(
        report,
        {"average_map": report.average_map, **{f"map/{tiou}": value for tiou, value in report.map_by_tiou.items()}},
        {
            "average_map": report.average_map,
            "map": report.map_by_tiou,
            "protocol": config.evaluation.protocol,
            "subset": report.coverage.subset,
            "class_agnostic": config.localizer.class_agnostic,
            "videos": len(predictions),
            "notes": report.coverage.notes(),
        },
        partial(write_results, predictions=predictions, classes=classes),
    )


def _judge_recognizer(engine: Engine, shards: ShardSet | FeatureSet, batches: Iterable[Batch]) -> Outcome:
    scores = classify(engine, batches, device=engine.device)
    classes = engine.module.classes
    report = accuracy(scores, true_classes(shards), classes=classes)
    shares = {"top1": report.top1, "top5": report.top5, "mean_class_accuracy": report.mean_class_accuracy}
    return Outcome(
        report, shares, {**shares, "videos": len(scores)}, partial(write_video_classes, scores=scores, classes=classes)
    )
