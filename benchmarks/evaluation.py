"""Time of mAP on a large load, and against a plain implementation of the same matching on a small one.

    python benchmarks/evaluation.py [--quick] [--json FILE]

The large load is 1,000,000 predictions over 5,000 videos and 200 classes at 10 thresholds: half of the predictions are
jittered true actions, the other half lies anywhere and may be of any class. The plain implementation visits every
prediction, every truth of its video and every threshold in Python, as the definition reads; both must agree.

All tables are those of a file of ActivityNet's size, 4,728 videos with 100 predictions each: mAP, AR@100, recall at 1x
and 5x, DETAD's errors, and intervals from 1000 draws of videos, from JSON to text.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

from re2tal.evaluation.average_precision import mean_average_precision
from re2tal.evaluation.matching import match_predictions
from re2tal.evaluation.protocols import TIOU_THRESHOLDS
from re2tal.evaluation.results import read_results, write_results
from re2tal.runs.evaluation import ScoringOptions
from re2tal.runs.evaluation import evaluate as evaluate_files
from re2tal.strict_json import write_json
from re2tal.structures import Action, Detections, VideoRecord

THRESHOLDS = TIOU_THRESHOLDS["activitynet"]
NUM_CLASSES = 200
CLASSES = tuple(f"class_{index:03d}" for index in range(NUM_CLASSES))


def synthetic_load(
    *, num_videos: int, num_predictions: int, generator: np.random.Generator
) -> tuple[dict[str, Detections], list[VideoRecord]]:
    """Videos of 2 minutes with one to eight actions of one or two classes, and detections that hit about half."""
    predictions, records = {}, []
    per_video = num_predictions // num_videos
    for index in range(num_videos):
        num_actions = int(generator.integers(1, 9))
        own_classes = generator.integers(NUM_CLASSES, size=2)
        starts = generator.uniform(0, 110, num_actions)
        true = np.stack([starts, starts + generator.uniform(1, 10, num_actions)], axis=1)
        true_labels = generator.choice(own_classes, num_actions)
        hits = per_video // 2
        source = generator.integers(num_actions, size=hits)
        jitter = generator.normal(0, 0.8, (hits, 2))
        anywhere = np.sort(generator.uniform(0, 120, (per_video - hits, 2)), axis=1)
        segments = np.concatenate([np.sort(true[source] + jitter, axis=1), anywhere])
        labels = np.concatenate([true_labels[source], generator.integers(NUM_CLASSES, size=per_video - hits)])
        video_id = f"video_{index:05d}"
        predictions[video_id] = Detections(
            torch.from_numpy(segments), torch.from_numpy(generator.uniform(0, 1, per_video)), torch.from_numpy(labels)
        )
        actions = tuple(
            Action(*segment, CLASSES[label]) for segment, label in zip(true.tolist(), true_labels, strict=True)
        )
        records.append(VideoRecord(video_id, "validation", 120.0, actions))
    return predictions, records


def plain_average_map(predictions: dict[str, Detections], records: list[VideoRecord]) -> float:
    """The definition, one prediction, truth and threshold at a time."""
    truths = defaultdict(lambda: defaultdict(list))
    for record in records:
        for action in record.actions:
            truths[action.label][record.video_id].append((action.start_seconds, action.end_seconds))
    ranked = defaultdict(list)
    for video_id, detections in predictions.items():
        rows = zip(detections.segments.tolist(), detections.scores.tolist(), detections.labels.tolist(), strict=True)
        for segment, score, label in rows:
            ranked[CLASSES[label]].append((score, video_id, segment))
    average_precisions = []
    for label, by_video in truths.items():
        rows = sorted(ranked[label], key=lambda row: -row[0])
        num_truths = sum(map(len, by_video.values()))
        average_precisions.append([plain_average_precision(rows, by_video, num_truths, t) for t in THRESHOLDS])
    return float(np.mean(average_precisions))


def plain_average_precision(rows: list, by_video: dict, num_truths: int, threshold: float) -> float:
    taken, precisions = set(), []
    for rank, (_, video_id, (start, end)) in enumerate(rows, 1):
        overlaps = []
        for index, (true_start, true_end) in enumerate(by_video.get(video_id, ())):
            overlap = max(0.0, min(end, true_end) - max(start, true_start))
            overlaps.append((overlap / (end - start + true_end - true_start - overlap), index))
        for tiou, index in sorted(overlaps, reverse=True):
            if tiou >= threshold and (video_id, index) not in taken:
                taken.add((video_id, index))
                precisions.append(len(taken) / rank)
                break
    best, total = 0.0, 0.0
    for precision in reversed(precisions):
        best = max(best, precision)
        total += best / num_truths
    return total


def timed(function, *arguments, **keywords):
    start = time.perf_counter()
    result = function(*arguments, **keywords)
    return time.perf_counter() - start, result


def evaluate(predictions: dict[str, Detections], records: list[VideoRecord]) -> float:
    report = mean_average_precision(
        match_predictions(predictions, records, classes=CLASSES, protocol="opentad", tiou_thresholds=THRESHOLDS)
    )
    return report.average_map


def all_tables_seconds(*, shrink: int, generator: np.random.Generator) -> dict[str, float]:
    """Processor seconds of all tables without and with intervals."""
    num_videos = 4_728 // shrink
    predictions, records = synthetic_load(num_videos=num_videos, num_predictions=100 * num_videos, generator=generator)
    seconds = {}
    with tempfile.TemporaryDirectory() as folder:
        results, truths = Path(folder) / "results.json", Path(folder) / "truths.json"
        write_results(results, predictions, CLASSES)
        write_json(truths, {"database": {record.video_id: as_entry(record) for record in records}})
        for name, draws in (("tables", 0), ("tables_and_intervals", 1000 // shrink)):
            options = ScoringOptions(dataset="activitynet", proposals=100, top_kx=(1, 5), errors=True, bootstrap=draws)
            start = time.process_time()
            str(evaluate_files(results, truths, options))
            seconds[name] = time.process_time() - start
    return seconds


def as_entry(record: VideoRecord) -> dict:
    annotations = [{"segment": [one.start_seconds, one.end_seconds], "label": one.label} for one in record.actions]
    return {"subset": record.subset, "duration": record.duration_seconds, "annotations": annotations}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of both loads")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    shrink = 10 if arguments.quick else 1
    generator = np.random.default_rng(arguments.seed)

    small = synthetic_load(num_videos=500 // shrink, num_predictions=50_000 // shrink, generator=generator)
    fast_seconds, fast_map = min(timed(evaluate, *small) for _ in range(3))
    plain_seconds, plain_map = timed(plain_average_map, *small)
    if abs(fast_map - plain_map) > 1e-9:
        raise SystemExit(f"the two implementations disagree: average mAP {fast_map} and {plain_map}")

    large = synthetic_load(num_videos=5_000 // shrink, num_predictions=1_000_000 // shrink, generator=generator)
    large_seconds, large_map = timed(evaluate, *large)
    with tempfile.TemporaryDirectory() as folder:
        write_seconds, _ = timed(write_results, Path(folder) / "results.json", large[0], CLASSES)
        read_seconds, _ = timed(read_results, Path(folder) / "results.json")
    tables = all_tables_seconds(shrink=shrink, generator=generator)
    figures = {
        "all_tables_cpu_seconds": tables,
        "small": {
            "predictions": sum(map(len, small[0].values())),
            "seconds": fast_seconds,
            "plain_seconds": plain_seconds,
            "speedup": plain_seconds / fast_seconds,
        },
        "large": {
            "predictions": sum(map(len, large[0].values())),
            "videos": len(large[1]),
            "classes": NUM_CLASSES,
            "thresholds": len(THRESHOLDS),
            "seconds": large_seconds,
            "write_seconds": write_seconds,
            "read_seconds": read_seconds,
            "average_map": large_map,
        },
    }
    print(f"{'load':<28}{'seconds':>10}{'plain':>10}{'ratio':>8}")
    print(
        f"{figures['small']['predictions']:>9,} predictions       {fast_seconds:>10.3f}{plain_seconds:>10.3f}"
        f"{plain_seconds / fast_seconds:>7.0f}x"
    )
    print(f"{figures['large']['predictions']:>9,} predictions       {large_seconds:>10.3f}{'-':>10}{'-':>8}")
    print(f"  the same as results JSON: written in {write_seconds:.2f} s, read in {read_seconds:.2f} s")
    print(
        f"all tables of ActivityNet's size, processor time: {tables['tables']:.1f} s; with intervals "
        f"{tables['tables_and_intervals']:.1f} s"
    )
    if arguments.json:
        write_json(arguments.json, figures)


if __name__ == "__main__":
    main()
