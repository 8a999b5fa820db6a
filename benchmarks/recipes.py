"""Memory of one training step of each rewired recipe as it stands, against the plain network and checkpointing.

    python benchmarks/recipes.py [--recipe NAME ...] [--json FILE]

Predicted by the dry run of `re2tal plan`, for a CPU: the most bytes alive at once in a step of one rank, without
parameters, optimizer and, as under ZeRO 2, gradients. Checkpointing is torch.utils.checkpoint around every residual
block of the plain network (see forms.py). "whole" is the recipe with its branches run whole.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from forms import checkpoint_blocks

from re2tal.backbones import BackboneConfig
from re2tal.config import RecognitionConfig, RunConfig
from re2tal.planning.dry_run import DryRun
from re2tal.recipes import RECIPES, find_recipe
from re2tal.rewire.config import SAVING
from re2tal.strict_json import write_json
from re2tal.tables import text_table

WHOLE = {name: getattr(BackboneConfig(), name) for name in SAVING}


def peak_gib(run: RunConfig | RecognitionConfig, *, checkpointed: bool = False, **changes: Any) -> float:
    """Of a step of `run` with these changes of its backbone."""
    run = replace(run, backbone=replace(run.backbone, **changes))
    step = DryRun(run, device=torch.device("cpu"), num_classes=20, free_gradients=True)
    if checkpointed:
        checkpoint_blocks(step.network.backbone)
    return step.trace().peak / 2**30


def main() -> None:
    """Predicts, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    backbones = {name: find_recipe(name).backbone for name in RECIPES}
    known = [name for name, one in backbones.items() if one.rewired and one.beta == 1]
    parser.add_argument("--recipe", action="append", choices=known, help="only these; may be repeated")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    found: dict[str, dict[str, float]] = {}
    for name in arguments.recipe or known:
        run = find_recipe(name)
        plain = peak_gib(run, rewired=False, **WHOLE)
        checkpoint = peak_gib(run, rewired=False, checkpointed=True, **WHOLE)
        own = peak_gib(run)
        found[name] = {"plain": plain, "checkpoint": checkpoint, "whole": peak_gib(run, **WHOLE), "as it stands": own}
        found[name] |= {"x plain": own / plain, "x checkpoint": own / checkpoint}
    heads = ("GiB", *next(iter(found.values())))
    rows = [(name, *(f"{value:.3f}" for value in row.values())) for name, row in found.items()]
    print(text_table([heads, *rows], align="<" + ">" * (len(heads) - 1)))
    if arguments.json:
        write_json(arguments.json, found)


if __name__ == "__main__":
    main()
