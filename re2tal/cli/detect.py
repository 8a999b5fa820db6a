"""`re2tal detect`: find actions with a trained detector, in video files or in shards."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from re2tal.cli.say import say_detected, say_found, say_shipped
from re2tal.runs.detection import detect as detect_in
from re2tal.runs.detection_job import AS_USUAL, DetectionOptions
from re2tal.runs.model_folder import SHIPPED


def detect(
    paths: Annotated[tuple[str, ...], tyro.conf.Positional] = (),
    /,
    *,
    model: Path | None = None,
    wanted: Annotated[DetectionOptions, tyro.conf.arg(name="")] = AS_USUAL,
    recursive: bool = False,
    batch_size: int | None = None,
    device: str | None = None,
    max_damaged: float = 0.02,
    shards: Path | None = None,
    videos: Path | None = None,
    run: Path | None = None,
) -> int:
    """Find actions in videos with a trained detector, and write them with their times.

    Started by torchrun, the ranks share the videos.

    Exit status 0 if all videos were looked at, 1 if some could not be used (each is named; the others are written), 2
    for wrong input, or where no video could be used, 130 when stopped by the keyboard (what was found is written).

    Args:
        paths: video files of any format and size, folders of them, and addresses of files (https, http, s3, gs, hf);
            results carry their names without the suffix. Without any, the run's validation shards are looked at
        model: model folder or run folder: config.json and model.safetensors. Of a run that is still training, or was
            interrupted, the newest sound checkpoint is taken. Or a model's name on the hub, OWNER/NAME. Without it, the
            small model that comes with the package
        wanted: which detections to write, and how
        recursive: look into the folders of folders too
        batch_size: clips in one forward; by default as in training
        device: "cpu", "cuda", "cuda:1", ...; by default an accelerator if there is one
        max_damaged: share of a video's frames that may be damaged or missing
        shards: folder of one subset's shards, or features, to look at instead of videos
        videos: the same as a folder in PATHS
        run: the same as --model
    """
    if model and run:
        raise ValueError("--model and --run mean the same; give one, the folder of a trained detector")
    if "" in paths:
        raise ValueError("one of the paths is empty; name a video, a folder or an address")
    chosen = model or run or SHIPPED
    if chosen == SHIPPED:
        say_shipped()
    done = detect_in(
        chosen,
        (*paths, *([videos] if videos else ())),
        recursive=recursive,
        shards=shards,
        wanted=wanted,
        batch_size=batch_size,
        device=device,
        max_damaged=max_damaged,
        say=say_found,
    )
    return say_detected(done)
