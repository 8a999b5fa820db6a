"""One page about a run: the mAP table, the curves and a timeline per video.

RUN/report/index.html     everything in one file
           curves.png
           timelines/     one PNG per video
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from re2tal.backbones.stored import NAME as STORED
from re2tal.config import RunConfig, load_config
from re2tal.data.contract.shards import open_any, subset_folder
from re2tal.evaluation.average_precision import MapReport, mean_average_precision
from re2tal.evaluation.ground_truth import as_one_class, read_ground_truth, without_duration
from re2tal.evaluation.results import Results, read_results
from re2tal.options import NOT_NEGATIVE, check
from re2tal.reporting.curves import draw_curves, read_metrics
from re2tal.reporting.fonts import to_png
from re2tal.reporting.page import Picture, write_page
from re2tal.reporting.timelines import draw_timeline
from re2tal.runs.evaluation import match_by, rules_of_run
from re2tal.runs.folder import CONFIG_NAME, METRICS_NAME, REPORT_NAME, RESULTS_NAME
from re2tal.structures import VideoRecord
from re2tal.video_ids import match_ids


def write_report(
    run: Path, *, predictions: Path | None = None, annotations: Path | None = None, max_videos: int = 100
) -> tuple[Path, MapReport | None]:
    """Write RUN/report/index.html, and the pictures in it as PNG files beside it; gives the page and its scores.

    Predictions on videos without a known truth are drawn, and not scored: None. The arguments are those of
    `re2tal report`.
    """
    check("max_videos", max_videos, NOT_NEGATIVE)
    config = load_config(run / CONFIG_NAME)
    results = read_results(predictions or run / RESULTS_NAME)
    truths = _truths(config, annotations)
    rules = rules_of_run(config, results.classes)
    drawn = _drawn(results, as_one_class(truths) if rules.class_agnostic else truths)
    scores = None
    if any(one.is_predicted and one.has_truth for one in drawn):
        scores = mean_average_precision(match_by(rules, results.predictions, truths, results.classes))
        scores.coverage.check()
    else:
        drawn = [one for one in drawn if one.is_predicted]
    folder = run / REPORT_NAME
    figure = draw_curves(read_metrics(run / METRICS_NAME), protocol=config.evaluation.protocol)
    curves = Picture("Loss, validation mAP, learning rates, speed, wait for clips and memory", to_png(figure))
    undated = without_duration(annotations) if annotations is not None else frozenset()
    timelines = _timelines(results, drawn[:max_videos], undated)
    _write_pictures(folder, curves, timelines)
    write_page(
        folder / "index.html",
        title=f"re2tal: {run.resolve().name}",
        facts=_facts(config, scores, num_drawn=len(timelines), num_videos=len(drawn), num_true=len(truths)),
        table=scores.rows() if scores else [],
        protocol=config.evaluation.protocol,
        curves=curves,
        timelines=list(timelines.values()),
    )
    return folder / "index.html", scores


@dataclass(frozen=True, slots=True)
class _Drawn:
    """One video of the page."""

    record: VideoRecord
    predicted_id: str
    """What the results call it."""
    is_predicted: bool
    has_truth: bool


def _drawn(results: Results, truths: Sequence[VideoRecord]) -> list[_Drawn]:
    """Predicted videos with a truth, then other videos with a truth, then predicted ones of which none is known."""
    renamed = match_ids(results.predictions, [record.video_id for record in truths])
    predicted = {renamed.get(one, one): one for one in results.predictions}
    known = [
        _Drawn(record, predicted.get(record.video_id, record.video_id), record.video_id in predicted, True)
        for record in truths
    ]
    # Stable: each half stays in the order of the annotations.
    known.sort(key=lambda one: not one.is_predicted)
    strangers = predicted.keys() - {record.video_id for record in truths}
    return known + [_Drawn(_as_record(one, results), one, True, False) for one in predicted if one in strangers]


def _as_record(video_id: str, results: Results) -> VideoRecord:
    """A video of which nothing but predictions is known: it lasts until the last of them ends, for the drawing."""
    ends = results.of(video_id).segments[:, 1].tolist()
    return VideoRecord(video_id, "", max([1.0, *ends]), ())


def _truths(config: RunConfig, annotations: Path | None) -> Sequence[VideoRecord]:
    """The true actions of the validation subset."""
    subset = config.data.validation_subset
    if annotations is not None:
        return read_ground_truth(annotations, subset=subset)
    return [video.record for video in open_any(subset_folder(config.data.shards, subset)).videos]


def _timelines(results: Results, videos: Sequence[_Drawn], undated: Collection[str]) -> dict[str, Picture]:
    """File name -> picture. An id that is no plain name, as other programs may have, does not reach the file system."""
    pictures = {}
    for number, one in enumerate(videos):
        found = results.of(one.predicted_id)
        figure = draw_timeline(
            one.record,
            found,
            classes=results.classes,
            has_truth=one.has_truth,
            is_length_known=one.record.video_id not in undated,
        )
        # Numbers before the names keep those apart that become equal.
        name = re.sub(r"[^A-Za-z0-9_-]", "_", one.record.video_id)[:80]
        pictures[f"{number:04d}_{name}.png"] = Picture(one.record.video_id, to_png(figure))
    return pictures


def _write_pictures(folder: Path, curves: Picture, timelines: Mapping[str, Picture]) -> None:
    # Pictures of an earlier page would lie beside those of this one.
    shutil.rmtree(folder / "timelines", ignore_errors=True)
    (folder / "timelines").mkdir(parents=True)
    (folder / "curves.png").write_bytes(curves.png)
    for name, picture in timelines.items():
        (folder / "timelines" / name).write_bytes(picture.png)


def _facts(
    config: RunConfig, scores: MapReport | None, *, num_drawn: int, num_videos: int, num_true: int
) -> dict[str, str]:
    frames, size = config.data.clips.windowing.num_frames, config.data.clips.size
    clips = f"{frames} frames of {size} x {size} pixels"
    if is_stored := config.backbone.name == STORED:
        clips = f"{frames} steps of stored features"
    wiring = "rewired" if config.backbone.rewired else "plain"
    epochs = config.training.epochs
    scored = {"Scored": f"nothing: no predicted video is among the {num_true} with known actions"}
    if scores is not None:
        scored = {
            "Protocol": scores.protocol,
            "Scored": scores.coverage.facts(),
            **{f"Note {number}": note for number, note in enumerate(scores.coverage.notes(), start=1)},
        }
    return {
        "Backbone": "none" if is_stored else f"{config.backbone.name}, {wiring}",
        "Localizer": type(config.localizer).__name__.removesuffix("Config"),
        "Clips": clips,
        "Training": (f"{epochs} epoch{'s' * (epochs != 1)}, {config.engine.precision}, seed {config.training.seed}"),
        **scored,
        "Videos": f"{num_videos}, of which {num_drawn} are drawn below" if num_drawn < num_videos else str(num_videos),
    }
