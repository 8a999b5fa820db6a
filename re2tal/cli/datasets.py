"""`re2tal datasets [NAME]`: what is known of published data sets, and whether an annotation file holds all of one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from re2tal.runs.datasets import check_dataset, list_datasets, show_dataset


def datasets(name: Annotated[str | None, tyro.conf.Positional] = None, /, *, check: Path | None = None) -> int:
    """List published data sets, or print all that is known of one: classes, subsets, blocked lists, traps, and where
    to get it.

    Exit status 1 if --check finds a difference.

    Args:
        name: a row of the list
        check: annotation JSON to compare with the numbers of NAME; each difference is named
    """
    if name is None:
        if check is not None:
            raise ValueError(f"--check {check} needs a NAME to compare with; `re2tal datasets` lists them")
        return list_datasets()
    return show_dataset(name) if check is None else check_dataset(name, check)
