"""`re2tal evaluate`: score a results JSON against an annotation file, or class scores against shards of clips."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from re2tal.evaluation.accuracy import AccuracyReport
from re2tal.evaluation.protocols import Dataset
from re2tal.runs.evaluation import Evaluated, evaluate_recognizer
from re2tal.runs.evaluation import evaluate as evaluate_detections
from re2tal.strict_json import write_json


def evaluate(
    *,
    predictions: Path,
    annotations: Path | None = None,
    shards: Path | None = None,
    subset: str = "validation",
    protocol: Literal["opentad", "official"] = "opentad",
    dataset: Dataset = "thumos14",
    tiou_thresholds: tuple[float, ...] | None = None,
    blocked_videos: Path | None = None,
    class_agnostic: bool = False,
    proposals: int | None = None,
    top_kx: tuple[int, ...] = (),
    errors: bool = False,
    json: Path | None = None,
) -> None:
    """Print the mean average precision of detections, by class and by temporal IoU, or a recognizer's accuracy.

    Args:
        predictions: results JSON in ActivityNet's layout, from this program or another, or a recognizer's
        annotations: annotation JSON in ActivityNet's layout
        shards: for a recognizer's results, folder of one subset of trimmed clips; only --json goes with it
        subset: which of its subsets to score
        protocol: whose rules count where the public evaluators differ: OpenTAD's or ActivityNet's
        dataset: the data set whose customary thresholds to use
        tiou_thresholds: other thresholds than those
        blocked_videos: video ids to leave out of both files: a JSON list, or a text file with one per line
        class_agnostic: score as if all labels, predicted and true, were one
        proposals: also print the average recall with up to so many detections per video, whatever their class
        top_kx: also print the recall of the best k x detections of each class in a video that shows it x times, for
            each k; Ego4D reports k = 1
        errors: also print where mAP is lost, as DETAD does: types of wrong predictions, mAP and missed actions by
            length, coverage and number of actions in the video
        json: also write the figures to this file
    """
    if (annotations is None) == (shards is None):
        raise ValueError("give --annotations FILE to score detections, or --shards FOLDER to score a recognizer")
    about_detections = (subset, protocol, tiou_thresholds, blocked_videos, class_agnostic, proposals, top_kx, errors)
    if shards is not None and about_detections != ("validation", "opentad", None, None, False, None, (), False):
        raise ValueError(
            f"--shards {shards} scores a recognizer, for which --subset, --protocol, --tiou-thresholds, "
            "--blocked-videos, --class-agnostic, --proposals, --top-kx and --errors mean nothing; leave them out"
        )
    if shards is not None:
        scored: AccuracyReport | Evaluated = evaluate_recognizer(predictions, shards)
    else:
        assert annotations is not None
        scored = evaluate_detections(
            predictions,
            annotations,
            subset=subset,
            protocol=protocol,
            dataset=dataset,
            tiou_thresholds=tiou_thresholds,
            blocked_videos=blocked_videos,
            class_agnostic=class_agnostic,
            proposals=proposals,
            top_kx=top_kx,
            errors=errors,
        )
    print(scored)
    if json is not None:
        write_json(json, scored.to_json())
