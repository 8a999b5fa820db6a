"""`re2tal evaluate`: score a results JSON against an annotation file, or class scores against shards of clips."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from re2tal.data.building.annotations import read_video_ids
from re2tal.data.building.clips import true_classes
from re2tal.data.contract.shards import open_shards
from re2tal.evaluation.accuracy import accuracy
from re2tal.evaluation.average_precision import mean_average_precision
from re2tal.evaluation.ground_truth import as_one_class, read_ground_truth
from re2tal.evaluation.protocols import TIOU_THRESHOLDS, Dataset
from re2tal.evaluation.recall import average_recall
from re2tal.evaluation.results import read_results
from re2tal.evaluation.video_classes import read_video_classes
from re2tal.localizers.class_map import AGNOSTIC_CLASS
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
        json: also write the figures to this file
    """
    if (annotations is None) == (shards is None):
        raise ValueError("give --annotations FILE to score detections, or --shards FOLDER to score a recognizer")
    if annotations is None:
        assert shards is not None
        given = (subset, protocol, tiou_thresholds, blocked_videos, class_agnostic, proposals)
        if given != ("validation", "opentad", None, None, False, None):
            raise ValueError(
                f"--shards {shards} scores a recognizer, for which --subset, --protocol, --tiou-thresholds, "
                "--blocked-videos, --class-agnostic and --proposals mean nothing; leave them out"
            )
        found, truth = read_video_classes(predictions), true_classes(open_shards(shards))
        shares = accuracy(found.scores, truth, classes=found.classes)
        print(shares)
        if json is not None:
            write_json(json, shares.to_json())
        return
    results = read_results(predictions)
    truths, classes = read_ground_truth(annotations, subset=subset), results.classes
    if class_agnostic:
        truths, classes = as_one_class(truths, label=AGNOSTIC_CLASS), (AGNOSTIC_CLASS,) * len(classes)
    blocked = read_video_ids(blocked_videos) if blocked_videos else frozenset()
    report = mean_average_precision(
        results.predictions,
        truths,
        classes=classes,
        protocol=protocol,
        tiou_thresholds=tiou_thresholds or TIOU_THRESHOLDS[dataset],
        blocked_videos=blocked,
    )
    print(report)
    figures = report.to_json()
    if proposals is not None:
        recall = average_recall(
            results.predictions,
            truths,
            classes=classes,
            protocol=protocol,
            proposals_per_video=proposals,
            blocked_videos=blocked,
        )
        print(f"AR@{proposals} {100 * recall.at(proposals):.2f}   AUC {100 * recall.auc:.2f}")
        figures["recall"] = recall.to_json()
    if json is not None:
        write_json(json, figures)
