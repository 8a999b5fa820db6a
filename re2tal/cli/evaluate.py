"""`re2tal evaluate`: score a results JSON against an annotation file, or class scores against shards of clips."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from re2tal.evaluation.accuracy import AccuracyReport
from re2tal.evaluation.epic_kitchens import EpicReport
from re2tal.files import output_file
from re2tal.runs.epic_kitchens import evaluate_submission
from re2tal.runs.evaluation import AS_USUAL, Evaluated, ScoringOptions, evaluate_recognizer
from re2tal.runs.evaluation import evaluate as evaluate_detections
from re2tal.strict_json import write_json


def evaluate(
    *,
    predictions: Path,
    annotations: Path | None = None,
    shards: Path | None = None,
    options: Annotated[ScoringOptions, tyro.conf.arg(name="")] = AS_USUAL,
    json: Path | None = None,
) -> None:
    """Print the mean average precision of detections, by class and by temporal IoU, or a recognizer's accuracy.

    Args:
        predictions: results JSON in ActivityNet's layout, from this program or another, or a recognizer's
        annotations: annotation JSON in ActivityNet's layout; for a submission to EPIC-Kitchens-100, whose verbs, nouns
            and actions are then scored, EPIC_100_validation.csv
        shards: for a recognizer's results, folder of one subset of trimmed clips; only --json goes with it
        options: what of the detections is scored, and by which rules
        json: also write the figures to this file
    """
    json = json and output_file(json, option="--json")
    scored = _scored(predictions, annotations, shards, options)
    print(scored)
    if json is not None:
        write_json(json, scored.to_json())


def _scored(
    predictions: Path, annotations: Path | None, shards: Path | None, options: ScoringOptions
) -> Evaluated | EpicReport | AccuracyReport:
    if annotations is not None and shards is None:
        if annotations.suffix.lower() == ".csv":
            return evaluate_submission(predictions, annotations, options)
        return evaluate_detections(predictions, annotations, options)
    if shards is None or annotations is not None:
        raise ValueError("give --annotations FILE to score detections, or --shards FOLDER to score a recognizer")
    if options != AS_USUAL:
        raise ValueError(
            f"--shards {shards} scores a recognizer, for which --subset, --protocol, --dataset, --tiou-thresholds, "
            "--blocked-videos, --class-agnostic, --proposals, --top-kx, --errors, --bootstrap, --seeds and "
            "--bootstrap-seed mean nothing; leave them out"
        )
    return evaluate_recognizer(predictions, shards)
