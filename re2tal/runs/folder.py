"""The files of a run folder, and whose folder it is.

runs/NAME/config.json        the whole configuration; `--config` starts from it again
          plan.json          how its stages run within a memory budget; a resumed run goes on with it
          metrics.jsonl      and tensorboard/: the course of the run; metrics.damaged: lines no longer readable
          checkpoints/       to --resume from
          clip_features/     of backbone.trained_clips: what the backbone last gave for clips; a new run begins anew
          model.safetensors  float32 weights (the moving average, if there is one) and class names
          best/              the best model so far, where training.keep_best is set; last.safetensors: then the last one
          model.json         what goes into the model and what comes out (`re2tal.runs.model_folder`)
          README.md          the model card: training and figures
          results.json       detections on the validation subset, or the probabilities of its classes
          summary.json       mAP or accuracy, and times
          report/            the page that `re2tal report` draws
          lock               which process writes here, while it does
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Collection
from pathlib import Path

from re2tal.distributed import is_main, made_by_main
from re2tal.strict_json import read_json
from re2tal.training.manifest import complete_checkpoints

CONFIG_NAME = "config.json"
PLAN_NAME = "plan.json"
METRICS_NAME = "metrics.jsonl"
DAMAGED_METRICS_NAME = "metrics.damaged"
MODEL_NAME = "model.safetensors"
LAST_MODEL_NAME = "last.safetensors"
BEST_NAME = "best"
FACTS_NAME = "model.json"
RESULTS_NAME = "results.json"
SUMMARY_NAME = "summary.json"
CHECKPOINTS_NAME = "checkpoints"
TENSORBOARD_NAME = "tensorboard"
REPORT_NAME = "report"
CLIP_FEATURES_NAME = "clip_features"

REPLACED = (
    CHECKPOINTS_NAME,
    TENSORBOARD_NAME,
    REPORT_NAME,
    BEST_NAME,
    PLAN_NAME,
    METRICS_NAME,
    DAMAGED_METRICS_NAME,
    SUMMARY_NAME,
    RESULTS_NAME,
    MODEL_NAME,
    LAST_MODEL_NAME,
    FACTS_NAME,
)
"""What a run that overwrites another removes. config.json is written anew right after, and README.md may be somebody's
own."""


def claim(folder: Path, *, resume: bool, overwrite: bool, start: Collection[Path] = ()) -> None:
    """Every rank calls this: makes the folder this run's own. ValueError where that would lose an earlier one, or a
    file that the new one is to `start` from."""
    checkpoints = folder / CHECKPOINTS_NAME

    def make() -> None:
        # Else a run would not find those to resume from, and could not make the folder for its own.
        if checkpoints.is_symlink() and not checkpoints.exists():
            raise ValueError(
                f"{checkpoints} is a link to {checkpoints.readlink()}, which is not there; mount its disk or make that "
                "folder, or remove the link"
            )
        if overwrite:
            removed = [folder / name for name in REPLACED]
            there = [one for one in removed if one.exists()]
            # Other programs have folders of these names too; each run writes its configuration before all else.
            if there and not (folder / CONFIG_NAME).exists():
                raise ValueError(
                    f"{folder} has {there[0].name}, but no {CONFIG_NAME}, so it is no run that could be overwritten; "
                    "choose another folder, or empty this one"
                )
            for one in removed:
                # What else lies there may be somebody's, and a link is to stay one.
                if one.is_symlink() and one.is_dir() and any(one.iterdir()):
                    raise ValueError(
                        f"{one} is a link to {one.readlink()}, and overwrite removes nothing behind a link; empty that "
                        "folder, or remove the link"
                    )
            for file in start:
                if any(file.resolve().is_relative_to(one.resolve()) for one in removed):
                    raise ValueError(
                        f"the run starts from {file}, which overwrite would remove; give it another folder (out)"
                    )
            for one in removed:
                if not one.is_dir():
                    one.unlink(missing_ok=True)
                elif not one.is_symlink():
                    shutil.rmtree(one, ignore_errors=True)
            if left := complete_checkpoints(checkpoints):
                raise ValueError(f"{checkpoints / left[0]} cannot be removed; remove it, or choose another folder")
        if not resume and checkpoints.is_dir() and any(checkpoints.iterdir()):
            raise ValueError(
                f"{folder} holds the checkpoints of an earlier run; continue it (resume), replace it (overwrite), or "
                "choose another folder"
            )
        # The new run would forget its figures at once, and replace its model in the end.
        if not overwrite and (folder / MODEL_NAME).exists() and not any(checkpoints.glob("step-*")):
            raise ValueError(
                f"{folder} holds a model, and no checkpoint to go on from; replace it (overwrite), or choose another "
                "folder"
            )
        folder.mkdir(parents=True, exist_ok=True)

    made_by_main(make)


def say_if_trained_on(folder: Path) -> None:
    """Says so where a run that had ended was resumed, and has checkpoints of later steps than its model.

    Until it ends again the model, results and figures in its folder are those of its first end.
    """
    newest, summary = complete_checkpoints(folder / CHECKPOINTS_NAME)[:1], folder / SUMMARY_NAME
    if not (is_main() and newest and summary.is_file()):
        return
    try:
        document = read_json(summary)
    except ValueError as error:
        # The model is there and sound: what is not known is only how old it is.
        print(f"{error}; whether the run has been trained on since its model was written is not known", file=sys.stderr)
        return
    steps = document.get("steps") if isinstance(document, dict) else None
    if isinstance(steps, int) and int(newest[0].removeprefix("step-")) > steps:
        print(
            f"{folder} holds the model of step {steps}, and has been trained on since (checkpoint {newest[0]}): go on "
            f"to the end of training for its new model, or remove {MODEL_NAME} to take the checkpoint's weights",
            file=sys.stderr,
        )
