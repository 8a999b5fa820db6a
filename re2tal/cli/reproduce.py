"""`re2tal reproduce thumos14|activitynet`: a published result, from the data to a card that compares."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import tyro

from re2tal.runs.deepspeed_presets import DEFAULT_PRESET
from re2tal.runs.exit_status import HUNG
from re2tal.runs.published import BackboneFamily, Target
from re2tal.runs.reproduction import Reproduction
from re2tal.runs.reproduction import reproduce as run_it
from re2tal.training.watchdog import RanksLost


def reproduce(
    dataset: Annotated[Target, tyro.conf.Positional],
    /,
    *,
    annotations: Path,
    shards: Path,
    weights: Path | None = None,
    backbone: BackboneFamily = "slowfast",
    video_classes: Path | None = None,
    blocked: Path | None = None,
    ds: str = DEFAULT_PRESET,
    out: Path | None = None,
    dry_run: bool = False,
    tiny: bool = False,
    resume: bool = False,
    overwrite: bool = False,
) -> int:
    """Check data, weights and machine, train the published setting, score it, and compare it with what was published.

    Writes card.md and card.json into the run folder. Exit status 0 if nothing was wrong, 1 if something makes the
    comparison doubtful (each is named), 2 for wrong input.

    Args:
        dataset: thumos14 or activitynet
        annotations: the annotation JSON that the shards were built from
        shards: what `re2tal shards build --dataset DATASET` wrote: folders training and validation
        weights: the pretrained backbone; its checksum is printed, and compared with the digits in its name
        backbone: slowfast is SlowFast-101, with the paper's best scores; swin is Video Swin-T
        video_classes: for activitynet, JSON of a classifier of whole videos, {"results": {ID: [K scores]}, "class": [K
            names]}, which names what is found
        blocked: video ids to leave out, beside those that the catalog names: a JSON list, or one per line
        ds: ZeRO stage: a preset, such as zero2, or the path of a DeepSpeed file
        out: run folder; runs/reproduce_DATASET_BACKBONE by default
        dry_run: check all, print memory and hours, and train nothing
        tiny: rehearse with a nano network for one epoch, on any machine
        resume: continue from the newest checkpoint in the run folder
        overwrite: remove what an earlier run left in the run folder
    """
    asked = Reproduction(
        dataset=dataset,
        annotations=annotations,
        shards=shards,
        weights=weights,
        backbone=backbone,
        video_classes=video_classes,
        blocked=blocked,
        ds=ds,
        out=out,
        dry_run=dry_run,
        tiny=tiny,
        resume=resume,
        overwrite=overwrite,
    )
    try:
        return run_it(asked)
    except RanksLost as error:
        print(f"re2tal: {error}", file=sys.stderr)
        return HUNG
