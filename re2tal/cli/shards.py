"""`re2tal shards build | index | verify | list`: videos and annotations, or trimmed clips, in; training data out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from re2tal.runs.shard_building import Build, build, describe, verify
from re2tal.runs.shard_indexing import index


@dataclass(frozen=True, slots=True)
class Index:
    """Take the videos of plain WebDataset tars as they are, after checking that each can be read by frame number.

    The tars may come from ShardWriter, img2dataset or video2dataset: KEY.mp4 beside KEY.json, .txt or .cls. Other
    members are ignored. Exit status 3 if more than --max-rejected of the videos cannot be used, 2 for wrong input.
    """

    tars: tyro.conf.Positional[Path]
    """Folder with .tar files, however deep."""
    out: Path
    """Folder to write to; each subset gets a folder in it."""
    annotations: Path | None = None
    """JSON in the layout of ActivityNet. A video is found by its key, or by video_id, id or url of its .json. Without
    it, the tars hold trimmed clips whose .cls, .txt or .json says their class."""
    subset: str = "training"
    """Without annotations: what the tars hold."""
    classes: Path | None = None
    """Text file with one class per line; it fixes their order, and labels that are numbers count in it."""
    dataset: str = "own"
    """Its name in the manifest."""
    max_rejected: float = 0.05
    """Share of a subset's videos that may be unusable without the exit status saying so."""


@dataclass(frozen=True, slots=True)
class Verify:
    """Read every byte of shard folders and compare it with what was built. Exit status 4 if anything differs."""

    folders: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of one subset each."""


@dataclass(frozen=True, slots=True)
class List:
    """Say what shard folders hold."""

    folders: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of one subset each."""


def shards(command: Annotated[Build | Index | Verify | List, tyro.conf.arg(name="")]) -> int:
    """Build shards from videos, take over tars of others, verify them, or list what they hold."""
    match command:
        case Build():
            return build(command)
        case Index():
            return index(
                command.tars,
                out=command.out,
                annotations=command.annotations,
                subset=command.subset,
                classes=command.classes,
                dataset=command.dataset,
                max_rejected=command.max_rejected,
            )
        case Verify():
            return verify(command.folders)
        case List():
            return describe(command.folders)
