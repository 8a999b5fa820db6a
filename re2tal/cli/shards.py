"""`re2tal shards build | index | verify | list`: videos and annotations, or trimmed clips, in; training data out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from re2tal.runs.shard_building import Build, build, describe, verify
from re2tal.runs.shard_indexing import Index, index


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
            return index(command)
        case Verify():
            return verify(command.folders)
        case List():
            return describe(command.folders)
