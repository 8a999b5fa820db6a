"""`re2tal compare`: the difference of two results in mAP, its interval, and whether chance explains it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from re2tal.files import output_file
from re2tal.runs.comparison import BY_DEFAULT, ComparisonOptions
from re2tal.runs.comparison import compare as compare_results
from re2tal.strict_json import write_json


def compare(
    a: tyro.conf.Positional[Path],
    b: tyro.conf.Positional[Path],
    *,
    annotations: Path | None = None,
    options: Annotated[ComparisonOptions, tyro.conf.arg(name="")] = BY_DEFAULT,
    json: Path | None = None,
) -> None:
    """Print the mAP of two results files, their difference B - A, its 95 % interval and its p, by a paired bootstrap.

    Args:
        a: results JSON in ActivityNet's layout, such as RUN/results.json
        b: results JSON of the same videos
        annotations: annotation JSON in ActivityNet's layout; by default those of the run folder that A lies in
        options: by which rules both are scored, by default those of that run; and how often videos are drawn
        json: also write the figures to this file
    """
    json = json and output_file(json, option="--json")
    found = compare_results(a, b, annotations=annotations, options=options)
    print(found)
    if json is not None:
        write_json(json, found.to_json())
