"""Writes re2tal/cli/help_pages.json: what `re2tal COMMAND --help` shows, taken from the commands themselves.

python docs/write_help_pages.py
"""

from __future__ import annotations

import argparse
import json
import re
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import tyro

from re2tal.cli import command, own_types
from re2tal.cli.commands import COMMANDS, STARTING_POINTS
from re2tal.cli.help import PAGES

MOST_OPTIONS = 10
OF_RUNS = (
    "--data.shards --backbone.name --backbone.weights --training.epochs --engine.batch-size --engine.memory-budget-gb"
)
MOST_USED = {
    "train": f"--out --resume {OF_RUNS}",
    "plan": "--memory-budget-gb --ranks --classes --ds --backbone.name --backbone.weights --engine.batch-size",
    "import": "WEIGHTS --out --classes --as-plain --videos --backbone.name",
    "detect": "PATHS --model --out --format --min-score --top --classes --recursive --batch-size --device",
    "shards build": "--out --annotations --videos --clips --classes --dataset --subsets --fps --short-side --workers",
    "features extract": "--shards --out --run --backbone.name --backbone.weights --window-frames --overlap --fps "
    "--batch-size --device",
    "reproduce": "DATASET --annotations --shards --weights --backbone --ds --out --dry-run --tiny --resume",
    "evaluate": "--predictions --annotations --subset --protocol --dataset --errors --bootstrap --proposals --shards "
    "--json",
    "rewire": "MODEL --weights --frames --size --unit --merge --beta --recompute",
}
"""Page of help -> its options that come first; a page that is not here shows its first ten."""


def parsers() -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Page and parser of each command and, behind it, of each of its sub-commands."""
    for name in COMMANDS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            parser = tyro.extras.get_parser(
                command(name, [])[0],
                prog=f"re2tal {name}",
                config=(tyro.conf.AvoidSubcommands,),
                registry=own_types(),
            )
        yield name, parser
        for action in parser._actions:
            if _is(action, "_SubParsersAction"):
                yield from ((f"{name} {word}", below) for word, below in (action.choices or {}).items())


def pages(parsers: Iterable[tuple[str, argparse.ArgumentParser]]) -> dict[str, dict[str, Any]]:
    """Page -> its usage, description, first options, and how many there are besides."""
    found: dict[str, dict[str, Any]] = {}
    for page, parser in parsers:
        found[page] = _page(page, parser)
        name, _, word = page.partition(" ")
        if word:
            found[name]["options"].append([word, found[page]["about"]])
    return found


def _page(page: str, parser: argparse.ArgumentParser) -> dict[str, Any]:
    options: dict[str, list[str]] = {}
    for action in parser._actions:
        if _is(action, "_HelpAction") or _is(action, "_SubParsersAction"):
            continue
        flag, words = _flag(action)
        options[flag] = [words, _first_of(_plain(action.help))]
    wanted = MOST_USED.get(page, "").split() or [*options][:MOST_OPTIONS]
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
        "about": _plain(parser.description).split("\n\n")[0],
        "options": shown,
        "others": len(options) - len(wanted),
    }


def _is(action: argparse.Action, kind: str) -> bool:
    return type(action).__name__ == kind  # tyro has its own copy of argparse


def _first_of(text: str) -> str:
    """The first sentence, and the default."""
    text, _, default = text.partition(" (default: ")
    text = text.removesuffix(" (required)")
    first = re.split(r"(?<=[a-z)])\. (?=[A-Z])", text)[0].rstrip(".")
    return f"{first} (default: {default}" if default not in ("", ")", "False)") else first


def _flag(action: argparse.Action) -> tuple[str, str]:
    """What an option is called, and that with its value."""
    metavar = _plain(str(action.metavar or "")).replace("{None}|", "").replace("{None,", "{")
    metavar = re.sub(r"\[?\[?(\w+) \[\1 \.\.\.\]\]?\]?", r"\1 ...", metavar)
    metavar = re.sub(r"\{([^}]*)\}", lambda found: found[1].replace(",", "|"), metavar)
    if not action.option_strings:
        name = action.dest.rpartition(".")[2].replace("_", "-").upper()
        return name, f"[{name} ...]" if action.nargs == "*" else f"[{name}]" if action.nargs == "?" else name
    if action.option_strings[-1].startswith("--no-") and "(default: False)" in _plain(action.help):
        return action.option_strings[0], action.option_strings[0]
    return action.option_strings[0], f"{', '.join(action.option_strings)} {metavar}".strip()


def _plain(text: str | None) -> str:
    text = re.sub(r"\x1b\[[0-9;]*m", "", text or "").replace(" (default: None)", "").replace("%%", "%")
    return " ".join(text.replace("\n\n", "\0").split()).replace("\0", "\n\n").strip()


if __name__ == "__main__":
    PAGES.write_text(json.dumps(pages(parsers()), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
