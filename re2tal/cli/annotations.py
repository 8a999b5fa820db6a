"""`re2tal annotations convert | formats`: files of annotation tools and data sets in, ActivityNet's layout out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from re2tal.runs.annotation_conversion import Conversion, convert, list_formats


@dataclass(frozen=True, slots=True)
class Convert(Conversion):
    """Convert annotation files into one file in ActivityNet's layout, which `re2tal shards build` takes.

    Formats are recognised by content. A row that cannot be read, or whose segment is reversed or lasts no time, is left
    out, counted and named.
    """

    inputs: tyro.conf.Positional[tuple[Path, ...]]
    """Files to convert; of a folder, all files in it."""


@dataclass(frozen=True, slots=True)
class Formats:
    """List the formats that can be converted."""


def annotation_files(command: Annotated[Convert | Formats, tyro.conf.arg(name="")]) -> int:
    """Convert annotation files, or list the formats that can be."""
    match command:
        case Convert():
            return convert(command)
        case Formats():
            return list_formats()
