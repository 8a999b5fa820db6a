"""What commands print alike."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from re2tal.backbones.stored import NAME as STORED
from re2tal.config import RecognitionConfig, RunConfig, load_run
from re2tal.data.contract.manifest import Rejection
from re2tal.evaluation.coverage import cut_by_limit
from re2tal.evaluation.protocols import TIOU_THRESHOLDS
from re2tal.progress import clock_time, printable
from re2tal.reporting.found import FoundInVideo
from re2tal.runs.detection import Detected
from re2tal.runs.evaluation import ScoringRules
from re2tal.runs.exit_status import SOME_LEFT_OUT
from re2tal.runs.folder import CONFIG_NAME, MODEL_NAME, RESULTS_NAME
from re2tal.runs.model_folder import CARD_NAME, SHIPPED
from re2tal.structures import find_subset
from re2tal.tables import text_table

if TYPE_CHECKING:
    from re2tal.runs.training_end import TrainedRun

MOST_SHOWN = 5
"""Actions of a video that are printed."""
MOST_ODD = 5


def say_found(video: FoundInVideo) -> str:
    """The surest actions of a video as a table."""
    actions = video.actions
    head = f"{printable(video.name)}, {clock_time(video.duration_seconds)}: {len(actions)} detections"
    if not actions:
        return head
    rows = [
        (f"{one.start_seconds:.1f}", f"{one.end_seconds:.1f}", f"{one.score:.3f}", printable(one.label))
        for one in actions[:MOST_SHOWN]
    ]
    table = text_table([("start s", "end s", "score", "label"), *rows], align=">>><")
    more = f"\n... {len(actions) - MOST_SHOWN} more" if len(actions) > MOST_SHOWN else ""
    return f"{head}\n{table}{more}"


def say_detected(done: Detected) -> int:
    """Print what was found where; gives the exit status."""
    status = SOME_LEFT_OUT if done.rejected else 0
    if not done.is_main:
        return status
    say_left_out(done.rejected)
    if done.odd:
        names = ", ".join(printable(path.name) for path in done.odd[:MOST_ODD])
        more = ", ..." if len(done.odd) > MOST_ODD else ""
        print(f"{len(done.odd)} files are no videos by their suffix, and were not looked at: {names}{more}")
    scores = f" with a score of {done.min_score:g} or more" if done.min_score else ""
    print(f"{done.num_detections} detections{scores} in {done.num_videos} videos; {done.path}")
    if done.num_kept:
        whose = "" if done.format_name == "json" else "; their files stay, whoever wrote them"
        print(f"{done.num_kept} videos were there already, and were not looked at again{whose}")
    if done.spared:
        print(f"{done.spared} was written by another program meanwhile, and stays as it left it", file=sys.stderr)
    if done.checkpoint:
        print(f"the run has not ended: its weights are those of {done.checkpoint}")
    if done.rejected:
        print(f"{len(done.rejected)} videos could not be used; they are named above")
    if done.cut_videos:
        print(cut_by_limit(done.cut_videos))
    return status


def say_shipped() -> None:
    """Print which model finds the actions where none was named."""
    print(
        "no --model: taking the small one that comes with the package. It knows nine everyday actions from 13 short "
        f"videos, so it shows how detection works and little more ({SHIPPED / CARD_NAME})",
        file=sys.stderr,
    )


def say_trained(trained: TrainedRun) -> None:
    """Print where the trained model is, how good, and what comes next."""
    summary, folder = trained.summary, shlex.quote(str(trained.folder))
    config = load_run(trained.folder / CONFIG_NAME)
    if isinstance(config, RecognitionConfig):
        figures = f"top-1 {100 * summary['top1']:.2f} %, top-5 {100 * summary['top5']:.2f} %"
        following = [
            f"re2tal classify --run {folder} --videos VIDEOS",
            f"re2tal train --backbone.weights {folder}/{MODEL_NAME}",
        ]
    else:
        protocol = f"protocol {summary['protocol']}, subset {summary['subset']}"
        figures = f"average mAP {100 * summary['average_map']:.2f} % ({protocol})"
        seen = "--shards FEATURES" if config.backbone.name == STORED else "VIDEOS"
        results = f"{folder}/{RESULTS_NAME}"
        following = [
            f"re2tal view {folder}",
            f"re2tal detect {seen} --model {folder}",
            " ".join(["re2tal evaluate --predictions", results, "--annotations annotations.json", *_rules_of(config)]),
        ]
    model = f"model: {trained.folder / MODEL_NAME}"
    print("\n".join([f"{model}; {figures}", "next:", *(f"    {one}" for one in following)]))


def _rules_of(config: RunConfig) -> Iterator[str]:
    """The options with which `re2tal evaluate` scores as the run does, where it would not without."""
    rules, usual = config.evaluation, ScoringRules()
    if find_subset(config.data.validation_subset, [usual.subset]) is None:
        yield f"--subset {shlex.quote(config.data.validation_subset)}"
    if rules.protocol != usual.protocol:
        yield f"--protocol {rules.protocol}"
    if rules.tiou_thresholds != TIOU_THRESHOLDS[usual.dataset]:
        named = [name for name, thresholds in TIOU_THRESHOLDS.items() if thresholds == rules.tiou_thresholds]
        yield f"--dataset {named[0]}" if named else f"--tiou-thresholds {' '.join(map(str, rules.tiou_thresholds))}"
    if rules.blocked_videos is not None:
        yield f"--blocked-videos {shlex.quote(str(rules.blocked_videos))}"
    if config.localizer.class_agnostic:
        yield "--class-agnostic"


def say_left_out(rejected: Iterable[Rejection]) -> None:
    """Print the video files that could not be used, and why."""
    for rejection in rejected:
        print(f"left out: {printable(rejection.video_id)}: {rejection.reason}", file=sys.stderr)
