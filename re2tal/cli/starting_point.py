"""Which recipe or configuration a command begins with: it decides what the other options mean, so it is read first."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from re2tal.config import RecognitionConfig, RunConfig, load_run
from re2tal.config.unions import CHOICES
from re2tal.recipes import RECIPES, find_recipe


def starting_point(arguments: Sequence[str], *, default: str) -> tuple[RunConfig | RecognitionConfig, list[str]]:
    """Takes --recipe (`default` without) or --config out of the arguments: the run they name, and the other ones.

    Options that choose one of several kinds, such as --localizer vsgn, are taken out too: the run then has that kind
    with its defaults, which the other options change.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    origin = parser.add_mutually_exclusive_group()
    origin.add_argument("--recipe", default=default)
    origin.add_argument("--config", type=Path)
    # `deepspeed` adds it for scripts that read no environment; ours does, and finds the same number there.
    parser.add_argument("--local_rank", "--local-rank", type=int)
    known, rest = parser.parse_known_args(list(arguments))
    run = find_recipe(known.recipe) if known.config is None else load_run(known.config)
    choices = CHOICES[run.task]
    kinds = argparse.ArgumentParser(prog="re2tal", usage="re2tal COMMAND [options]", add_help=False, allow_abbrev=False)
    for choice in choices:
        kinds.add_argument(f"--{choice.key}", f"--{choice.key}.{choice.tag}", dest=choice.key)
    chosen, rest = kinds.parse_known_args(rest)
    for choice in choices:
        if (name := getattr(chosen, choice.key)) is not None:
            run = choice.replaced(run, name)
    if {"-h", "--help"} & set(rest):
        print(f"--recipe {{{','.join(RECIPES)}}} or --config FILE choose the values shown as defaults below")
        for choice in choices:
            print(f"--{choice.key} {{{','.join(choice.kinds)}}} chooses one with its defaults; here {choice.name(run)}")
        print()
    return run, rest
