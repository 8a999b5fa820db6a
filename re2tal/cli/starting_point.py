"""Which recipe or configuration a command begins with: it decides what the other options mean, so it is read first."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from re2tal.config import AnyRun, load_run
from re2tal.config.schema import without_settings
from re2tal.config.unions import CHOICES
from re2tal.options import names_with
from re2tal.recipes import find_recipe
from re2tal.rewire.config import SAVING

NOT_REWIRED = "where the backbone is not rewired"


def starting_point(arguments: Sequence[str], *, default: str) -> tuple[AnyRun, list[str]]:
    """Takes --recipe (`default` without) or --config out of the arguments: the run they name, and the other ones.

    Options that choose one of several kinds, such as --localizer vsgn, are taken out too: the run then has that kind
    with its defaults, which the other options change.
    """
    # No abbreviations: --re would be taken for --recipe here, and its value be lost to the parser of the other options.
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    origin = parser.add_mutually_exclusive_group()
    origin.add_argument("--recipe", default=default)
    origin.add_argument("--config", type=Path)
    # `deepspeed` adds it for scripts that read no environment; ours does, and finds the same number there.
    parser.add_argument("--local_rank", "--local-rank", type=int)
    known, rest = parser.parse_known_args(list(arguments))
    run = find_recipe(known.recipe) if known.config is None else load_run(known.config)
    choices = CHOICES[run.task]
    # With a program's name and usage: its errors are shown to users.
    kinds = argparse.ArgumentParser(prog="re2tal", usage="re2tal COMMAND [options]", add_help=False, allow_abbrev=False)
    for choice in choices:
        kinds.add_argument(f"--{choice.key}", f"--{choice.key}.{choice.tag}", dest=choice.key)
    chosen, rest = kinds.parse_known_args(rest)
    for choice in choices:
        if (name := getattr(chosen, choice.key)) is not None:
            run = choice.replaced(run, name)
    # After the kinds are chosen, before tyro applies the other options.
    run = _without_what_options_rule_out(run, rest)
    if {"-h", "--help"} & set(rest):
        print("--recipe NAME (`re2tal recipes` lists them) or --config FILE choose the values shown as defaults below")
        for choice in choices:
            print(f"--{choice.key} {{{','.join(choice.kinds)}}} chooses one with its defaults; here {choice.name(run)}")
        print()
    return run, rest


def _without_what_options_rule_out(run: AnyRun, options: Sequence[str]) -> AnyRun:
    """`run` without its memory settings where an option leaves them no meaning, as whole blocks do; where the backbone
    is not rewired, without all that only a rewired one has.

    Nobody typed them, so they are no error; a line says so. Those that are typed are applied later, and refused.
    """
    reason = _ruled_out_by(run, options)
    if reason is None:
        return run
    of_rewired = list(names_with(run.backbone, "of_rewired"))
    run, replaced = without_settings(run, of_rewired if reason == NOT_REWIRED else SAVING)
    left_out = [f"backbone.{name} {value}" for name, value in replaced.items()]
    if reason == NOT_REWIRED and run.annealing.epochs > 0:
        left_out.append(f"annealing.epochs {run.annealing.epochs:g}")
        run = replace(run, annealing=replace(run.annealing, epochs=0.0))
    # Once, not from every rank.
    if left_out and os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
        print(f"left out: {', '.join(left_out)}: without meaning {reason}", file=sys.stderr)
    return run


def _ruled_out_by(run: AnyRun, options: Sequence[str]) -> str | None:
    """Which of the options leaves settings of memory no meaning, if any does."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("rewired", "recompute", "norm_eval"):
        for spelling in {name, name.replace("_", "-")}:  # tyro takes both
            parser.add_argument(f"--backbone.{spelling}", dest=name, action="store_true", default=None)
        for spelling in {f"no_{name}", f"no-{name}", f"no-{name}".replace("_", "-")}:
            parser.add_argument(f"--backbone.{spelling}", dest=name, action="store_false", default=None)
    for name in ("unit", "name"):
        # An option without its value is tyro's to refuse.
        parser.add_argument(f"--backbone.{name}", dest=name, nargs="?")
    typed = {
        name: value for name, value in vars(parser.parse_known_args(list(options))[0]).items() if value is not None
    }
    if typed.get("rewired") is False:
        return NOT_REWIRED
    if typed.get("recompute") is False:
        return "where activations are saved"
    if typed.get("unit") == "block":
        return "in whole blocks, unit 'block'"
    learns = not typed.get("norm_eval", run.backbone.norm_eval)
    if learns and typed.get("name", run.backbone.name).startswith("slowfast"):
        return "where batch norms learn (no norm_eval): they need the whole batch"
    return None
