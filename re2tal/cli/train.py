"""`re2tal train`, or launch/train.py under a launcher: train a network, evaluate it, write what came out."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import tyro

from re2tal.cli.say import say_trained
from re2tal.config import AnyRun
from re2tal.runs import training_run
from re2tal.runs.deepspeed_presets import DEFAULT_PRESET
from re2tal.runs.exit_status import HUNG, INTERRUPTED
from re2tal.training.watchdog import RanksLost


def train(
    *,
    run: Annotated[AnyRun, tyro.conf.arg(name="")],
    ds: str = DEFAULT_PRESET,
    out: Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> int:
    """Train a detector, or a recognizer, and evaluate it on the validation subset.

    Every rank calls this: start several with `deepspeed launch/train.py` or torchrun.

    Args:
        run: the configuration, from --recipe NAME (demo by default) or --config FILE, with every field open to change
        ds: ZeRO stage, offload, communication: a preset, such as zero2, or the path of a DeepSpeed file
        out: run folder; runs/NAME by default
        resume: continue from the newest sound checkpoint in the run folder, or start if there is none
        overwrite: remove what an earlier run left in the run folder
    """
    try:
        trained = training_run.train(run, ds=ds, out=out, resume=resume, overwrite=overwrite)
    # A status of its own: a scheduler may start this again with --resume.
    except RanksLost as error:
        print(f"re2tal: {error}", file=sys.stderr)
        return HUNG
    if trained.report is not None:
        print(trained.report)
        say_trained(trained)
    return INTERRUPTED if trained.interrupted else 0
