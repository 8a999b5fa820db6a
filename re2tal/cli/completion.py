"""Completion of commands and options in a shell."""

from __future__ import annotations

import io
import re
from contextlib import redirect_stdout, suppress

import tyro

from re2tal.cli import command, own_types
from re2tal.cli.commands import COMMANDS


def print_completion(shell: str) -> None:
    """Print a script for bash, zsh or fish; the options of train are those of the recipe that it begins with."""
    # It ends by leaving the process.
    written = io.StringIO()
    with redirect_stdout(written), suppress(SystemExit):
        tyro.extras.subcommand_cli_from_dict(
            {name: command(name, [])[0] for name in COMMANDS},
            prog="re2tal",
            args=["--tyro-write-completion", shell, "-"],
            config=(tyro.conf.AvoidSubcommands,),
            registry=own_types(),
        )
    # The script takes each line of an answer for a word, and descriptions have several.
    print(re.sub(r"(?m)^COMPLETION_SPEC = .*", lambda line: line[0].replace(r"\n", " "), written.getvalue()), end="")
