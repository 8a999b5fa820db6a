"""One page about a run: the mAP table, the curves and a timeline per video.

RUN/report/index.html     everything in one file
           curves.png
           timelines/     one PNG per video
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from re2tal.config import RunConfig, load_config
from re2tal.data.contract.shards import open_any, subset_folder
from re2tal.evaluation.average_precision import MapReport, mean_average_precision
from re2tal.evaluation.ground_truth import as_one_class, read_ground_truth
from re2tal.evaluation.results import Results, read_results
from re2tal.localizers.class_map import AGNOSTIC_CLASS
from re2tal.reporting.curves import draw_curves, read_metrics
from re2tal.reporting.page import Picture, to_png, write_page
from re2tal.reporting.timelines import draw_timeline
from re2tal.runs.folder import CONFIG_NAME, METRICS_NAME, REPORT_NAME, RESULTS_NAME
from re2tal.structures import VideoRecord


def write_report(
    run: Path, *, predictions: Path | None = None, annotations: Path | None = None, max_videos: int = 100
) -> tuple[Path, MapReport]:
    """Write RUN/report/index.html, and the pictures in it as PNG files beside it; gives the page and its scores.

    The arguments are those of `re2tal report`.
    """
    config = load_config(run / CONFIG_NAME)
    results = read_results(predictions or run / RESULTS_NAME)
    truths = _truths(config, annotations)
    # A class-agnostic detector's results have their one class, unless a classifier of whole videos named them.
    class_agnostic = config.localizer.class_agnostic and set(results.classes) <= {AGNOSTIC_CLASS}
    scores = mean_average_precision(
        results.predictions,
        truths,
        classes=results.classes,
        protocol=config.evaluation.protocol,
        tiou_thresholds=config.evaluation.tiou_thresholds,
        class_agnostic=class_agnostic,
        max_per_video=None if predictions else config.suppression.max_per_video,
    )
    scores.coverage.check()
    folder = run / REPORT_NAME
    curves = Picture("Loss, validation mAP and learning rates", to_png(draw_curves(read_metrics(run / METRICS_NAME))))
    timelines = _timelines(results, (as_one_class(truths) if class_agnostic else truths)[:max_videos])
    _write_pictures(folder, curves, timelines)
    write_page(
        folder / "index.html",
        title=f"re2tal: {run.resolve().name}",
        facts=_facts(config, scores, num_drawn=len(timelines)),
        table=scores.rows(),
        curves=curves,
        timelines=list(timelines.values()),
    )
    return folder / "index.html", scores


def _truths(config: RunConfig, annotations: Path | None) -> Sequence[VideoRecord]:
    """The true actions of the validation subset."""
    subset = config.data.validation_subset
    if annotations is not None:
        return read_ground_truth(annotations, subset=subset)
    return [video.record for video in open_any(subset_folder(config.data.shards, subset)).videos]


def _timelines(results: Results, records: Sequence[VideoRecord]) -> dict[str, Picture]:
    """File name -> picture. An id that is no plain name, as other programs may have, does not reach the file system."""
    pictures = {}
    for number, record in enumerate(records):
        figure = draw_timeline(record, results.of(record.video_id), classes=results.classes)
        name = re.sub(r"[^A-Za-z0-9_-]", "_", record.video_id)[:80]
        pictures[f"{number:04d}_{name}.png"] = Picture(record.video_id, to_png(figure))
    return pictures


def _write_pictures(folder: Path, curves: Picture, timelines: Mapping[str, Picture]) -> None:
    shutil.rmtree(folder / "timelines", ignore_errors=True)
    (folder / "timelines").mkdir(parents=True)
    (folder / "curves.png").write_bytes(curves.png)
    for name, picture in timelines.items():
        (folder / "timelines" / name).write_bytes(picture.png)


def _facts(config: RunConfig, scores: MapReport, *, num_drawn: int) -> dict[str, str]:
    num_videos = scores.coverage.num_videos
    windowing = config.data.clips.windowing
    return {
        "Backbone": f"{config.backbone.name}, {'rewired' if config.backbone.rewired else 'plain'}",
        "Localizer": type(config.localizer).__name__.removesuffix("Config"),
        "Clips": f"{windowing.num_frames} frames of {config.data.clips.size} x {config.data.clips.size} pixels",
        "Training": f"{config.training.epochs} epochs, {config.engine.precision}, seed {config.training.seed}",
        "Protocol": scores.protocol,
        "Scored": scores.coverage.facts(),
        **{f"Note {number}": note for number, note in enumerate(scores.coverage.notes(), start=1)},
        "Videos": f"{num_videos}, of which {num_drawn} are drawn below" if num_drawn < num_videos else str(num_videos),
    }
