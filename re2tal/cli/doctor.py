"""`re2tal doctor`: what is wrong with videos and annotations before a build, or what this machine has."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from re2tal.files import output_file
from re2tal.runs.doctor import check_data, check_machine


def doctor(
    videos: Annotated[Path | None, tyro.conf.Positional] = None,
    annotations: Annotated[Path | None, tyro.conf.Positional] = None,
    /,
    *,
    json: Path | None = None,
    quick: bool = False,
    max_damaged: float = 0.02,
    workers: int | None = None,
) -> int:
    """Look at a folder of videos, and at the annotations of them, before shards are built; without arguments at this
    machine: versions, devices, DeepSpeed's operations, shared memory, limits.

    Exit status 1 if something would be left out or refused.

    Args:
        videos: folder of video files, sub-folders too
        annotations: annotation JSON; only its videos are looked at then
        json: file to write all findings to
        quick: read packets only, and decode nothing: damaged pictures are not seen
        max_damaged: share of a video's frames that may be damaged or missing
        workers: processes that read; by default one per core that this process may use
    """
    json = json and output_file(json, option="--json")
    if videos is None:
        return check_machine(json=json)
    return check_data(videos, annotations, json=json, quick=quick, max_damaged=max_damaged, workers=workers)
