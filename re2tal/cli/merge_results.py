"""`re2tal merge-results`: several results files as one, and names for class-agnostic detections."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import tyro

from re2tal.runs.merging import AS_USUAL, MergeOptions
from re2tal.runs.merging import merge_results as merge


def merge_results(
    results: tyro.conf.Positional[tuple[Path, ...]],
    *,
    out: Path,
    options: Annotated[MergeOptions, tyro.conf.arg(name="")] = AS_USUAL,
) -> None:
    """Write the detections of several runs as one results JSON: together, repeats suppressed, best first.

    Args:
        results: results JSON files of the same videos, in ActivityNet's layout
        out: results JSON to write
        options: how results are merged
    """
    done = merge(results, out, options)
    for note in done.notes:
        print(f"note: {note}", file=sys.stderr)
    print(f"{done.num_detections} detections in {done.num_videos} videos; {done.path}")
