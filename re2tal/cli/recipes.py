"""`re2tal recipes [NAME]`: settings to train with, what is published of them, and in what they differ from that."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from re2tal.runs.recipes import list_recipes, show_recipe, write_page


def recipes(
    name: Annotated[str | None, tyro.conf.Positional] = None, /, *, memory: bool = False, write: Path | None = None
) -> None:
    """List recipes, or print what is known of one: the command, what it was made for, the published mAP of its source,
    and in what it differs from that.

    Args:
        name: a row of the list, or parts put together, such as charades_re2videomae_base_vsgn_features
        memory: plan a training step of NAME too, which takes seconds
        write: a Markdown page in which the list is brought up to date, between its marks
    """
    if name is None and memory:
        raise ValueError("--memory plans one recipe; give its NAME: `re2tal recipes` lists them")
    if write is not None:
        if name is not None:
            raise ValueError(f"--write {write} writes all recipes; leave {name} out")
        write_page(write)
    elif name is None:
        list_recipes()
    else:
        show_recipe(name, memory=memory)
