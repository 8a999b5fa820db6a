"""`re2tal init`: look at videos and annotations, and write a configuration that suits them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from re2tal.progress import printable
from re2tal.runs.initialisation import initialise
from re2tal.runs.initialisation_settings import Start


def init(
    videos: Annotated[Path, tyro.conf.Positional],
    annotations: Annotated[Path, tyro.conf.Positional],
    /,
    *,
    out: Path = Path("recipe.json"),
    shards: Path | None = None,
    weights: str | None = None,
    backbone: str | None = None,
) -> None:
    """Look at videos and annotations, and write a configuration that re2tal train --config takes.

    Prints each choice with its reason, what about the data may disappoint, and the commands that come next. Only the
    headers and packets of videos are read: re2tal doctor looks at their pictures.

    Args:
        videos: folder of the video files, sub-folders too
        annotations: JSON in ActivityNet's layout, with a training and a validation subset
        out: file to write
        shards: folder where shards will be; "shards" beside the file by default
        weights: start from a pretrained backbone: its file, a folder or a name on the hub
        backbone: its name; swin3d_tiny with --weights, swin3d_nano without
    """
    done = initialise(videos, annotations, out, shards=shards, start=Start(backbone, weights))
    for key, value, why in done.reasons:
        print(f"{key}: {printable(value)}\n    {printable(why)}")
    for note in done.notes:
        print(f"note: {printable(note)}")
    print(f"{out}: a configuration; every field can be changed there or on the command line. Next:")
    for command in done.commands:
        print(f"    {command}")
