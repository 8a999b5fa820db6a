"""Writes re2tal/cli/help_pages.json: what `re2tal COMMAND --help` shows, taken from the commands themselves.

python docs/write_help_pages.py
"""

from __future__ import annotations

import argparse
import json
import re
import warnings
from typing import Any

import tyro

from re2tal.cli import command, short_floats
from re2tal.cli.commands import COMMANDS, MOST_USED, STARTING_POINTS
from re2tal.cli.help import PAGES

MOST_OPTIONS = 10


def pages() -> dict[str, dict[str, Any]]:
    """Page -> its usage, description, first options, and how many there are besides."""
    found: dict[str, dict[str, Any]] = {}
    for name in COMMANDS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            parser = tyro.extras.get_parser(
                command(name, [])[0],
                prog=f"re2tal {name}",
                config=(tyro.conf.AvoidSubcommands,),
                registry=short_floats(),
            )
        found[name] = _page(name, parser)
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for word, below in action.choices.items():
                    found[f"{name} {word}"] = _page(f"{name} {word}", below)
                found[name]["options"] = [
                    [word, _plain(below.description).split("\n\n")[0]] for word, below in action.choices.items()
                ]
    return found


def _page(page: str, parser: argparse.ArgumentParser) -> dict[str, Any]:
    options: dict[str, list[str]] = {}
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction | argparse._SubParsersAction):
            continue
        flag, words = _flag(action)
        options[flag] = [words, _plain(action.help)]
    wanted = MOST_USED.get(page) or [*options][:MOST_OPTIONS]
    starting = [
        ["--recipe NAME", f"begin with the settings that `re2tal recipes` lists under this name ({recipe})"]
        for recipe in (STARTING_POINTS.get(page),)
        if recipe
    ]
    if starting:
        starting.append(["--config FILE", "or with those of a file, as `re2tal init` and training write it"])
    shown = [*starting, *(options[flag] for flag in wanted)]
    positional = "".join(f" {words}" for flag, (words, _) in options.items() if not flag.startswith("--"))
    return {
        "usage": f"usage: re2tal {page}{positional} [options]",
        "about": _plain(parser.description),
        "options": shown,
        "others": len(options) - len(wanted),
    }


def _flag(action: argparse.Action) -> tuple[str, str]:
    """What an option is called, and that with its value."""
    metavar = str(action.metavar or "")
    if not action.option_strings:
        return metavar.split(" ")[-1].strip("[]{}"), metavar
    flag = action.option_strings[0]
    return flag, " ".join([", ".join(action.option_strings), metavar]).strip()


def _plain(text: str | None) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text or "").strip()


if __name__ == "__main__":
    PAGES.write_text(json.dumps(pages(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
