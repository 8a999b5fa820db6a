"""`re2tal shards build | annotate | index | merge | verify | list`: videos and annotations in, training data out."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from re2tal.options import SHARE, check_options
from re2tal.runs.shard_building import Build, build
from re2tal.runs.shard_changes import merge, relabel
from re2tal.runs.shard_indexing import index
from re2tal.runs.shard_listing import describe, verify


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
    fix_labels: bool = False
    """Read labels that differ by case, space or Unicode form as one class, and say so; otherwise they are an error."""
    shard_size: str = "2GB"
    """How large a shard may be, unless a single video is larger."""


@dataclass(frozen=True, slots=True)
class Annotate:
    """Replace annotations, classes, subsets and durations of shards that are there; nothing is encoded.

    Each folder changes as a whole. A video that changes its subset is copied to the other folder as it is. Videos that
    the file does not list stay in their tars, and a later file may list them again; those it lists that are not in the
    shards are named. Exit status 3 if they are more than --max-rejected of a subset, 2 for wrong input.
    """

    shards: tyro.conf.Positional[Path]
    """Folder that holds a folder per subset, or one of these."""
    annotations: tyro.conf.Positional[Path]
    """JSON in the layout of ActivityNet."""
    classes: Path | None = None
    """Text file with one class per line; it fixes their order."""
    invalid_segments: Literal["refuse", "drop"] = "refuse"
    """What to do with segments that are reversed, empty, negative, or longer than the video."""
    fix_labels: bool = False
    """Read labels that differ by case, space or Unicode form as one class, and say so; otherwise they are an error."""
    max_rejected: float = 0.05
    """Share of a subset's videos that may be left out without the exit status saying so."""


@dataclass(frozen=True, slots=True)
class Merge:
    """Join shard folders: tars are linked or copied, each video checked; classes add up.

    Of videos with one id that are the same, one is taken; of those that differ, none, and they are named.
    """

    folders: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of a subset, or folders that hold one per subset."""
    out: Path
    """Folder to write to; each subset gets a folder in it."""


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


def shards(command: Annotated[Build | Annotate | Index | Merge | Verify | List, tyro.conf.arg(name="")]) -> int:
    """Build shards from videos, annotate or merge them, take over tars of others, verify or list what is there."""
    if isinstance(command, Annotate | Index):
        check_options(command, max_rejected=SHARE)
    match command:
        case Build():
            return build(command)
        case Annotate():
            return relabel(**asdict(command))
        case Index():
            return index(**asdict(command))
        case Merge():
            return merge(**asdict(command))
        case Verify():
            return verify(command.folders)
        case List():
            return describe(command.folders)
