"""Commands in processes of their own, as where nobody launched ranks, that have imported everything already.

re2tal("train", "--config", "recipe.json", cwd=tmp_path).output
"""

from __future__ import annotations

import os
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import NamedTuple

from distributed.ranks import run_ranks

from re2tal.cli import main
from re2tal.distributed import World


class Said(NamedTuple):
    """What a command said on its two streams."""

    output: str
    errors: str


def re2tal(*arguments: object, cwd: Path, world_size: int = 1) -> Said:
    """What the command said, and of several ranks the first; RuntimeError with it where the command fails."""
    given = {"folder": str(cwd), "arguments": [*map(str, arguments)]}
    first, *_ = run_ranks(said_in, world_size=world_size, timeout_seconds=280, **given)
    return Said(*first)


def said_in(folder: str, arguments: list[str]) -> list[str]:
    os.chdir(folder)
    forget_a_world_of_one()
    with redirect_stdout(StringIO()) as output, redirect_stderr(StringIO()) as errors:
        try:
            main(arguments)
        except SystemExit as end:
            if end.code:
                print(errors.getvalue(), file=sys.__stderr__)
                raise
    return [output.getvalue(), errors.getvalue()]


def forget_a_world_of_one() -> None:
    if os.environ["WORLD_SIZE"] == "1":
        for name in World().variables():
            del os.environ[name]
