"""The memory of a run's step in other forms of its backbone, on growing numbers of ranks.

plain         everything is kept
checkpoint    the plain network, of which the input of every block is kept (beta 0)
rewired       two states of every run are kept (beta 1); all of it trains
adapters      the plain network, checkpointed and frozen; AdaTAD's adapters train
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from re2tal.backbones import BackboneConfig
from re2tal.backbones.base import ADAPTER_OF
from re2tal.config import AnyRun
from re2tal.options import names_with
from re2tal.planning.choice import zero_memory_of
from re2tal.planning.dry_run import DryRun
from re2tal.planning.step_memory import StepMemory, step_memory
from re2tal.training.annealing import AnnealingConfig
from re2tal.training.zero_file import resolve_deepspeed_config

FORMS = ("plain", "checkpoint", "rewired", "adapters")
PIECES = 512.0
"""MiB of a piece of a branch, where the run names none."""


def in_form(run: AnyRun, form: str) -> AnyRun | None:
    """`run` in one of `FORMS`; None for adapters in a family without a place for them.

    Raises ValueError for a run without a network, and for an unknown form.
    """
    given = run.backbone
    default = BackboneConfig()
    if given.feature_channels is not None:
        raise ValueError(f"backbone.name is {given.name!r}: there is no backbone that could take other forms")
    if form not in FORMS:
        raise ValueError(f"unknown form {form!r}; known: {list(FORMS)}")
    # What belongs to one form only, so that no form inherits another's options.
    reset = [*names_with(default, "of_rewired"), *names_with(default, "wiring"), *ADAPTER_OF, "adapter", "recompute"]
    plain = replace(given, rewired=False, **{name: getattr(default, name) for name in reset})
    match form:
        case "plain":
            backbone = plain
        case "rewired":
            backbone = replace(plain, rewired=True, chunk_mebibytes=given.chunk_mebibytes or PIECES)
        case _:
            # A rewired run of whole blocks without memory of a second state is checkpointing: only inputs are kept.
            backbone = replace(plain, rewired=True, unit="block", beta=0.0)
    if form == "adapters":
        if not given.name.startswith("videomae"):
            return None
        backbone = replace(backbone, adapter="temporal", adapter_blocks=given.adapter_blocks, clips_at_once=None)
    return replace(
        run, backbone=backbone, annealing=AnnealingConfig(), engine=replace(run.engine, memory_budget_gb=None)
    )


def memory_on_ranks(
    run: AnyRun, ds: Path, *, ranks: Sequence[int], num_classes: int, device: torch.device
) -> list[StepMemory]:
    """Of a step of `run` on each of these numbers of ranks, which see the same clips a rank, without a budget."""
    settings = {number: resolve_deepspeed_config(ds, run.engine, world_size=number) for number in ranks}
    stages = [one["zero_optimization"].get("stage", 0) for one in settings.values()]
    # One trace serves all numbers of ranks, which differ in what is sharded only.
    dry_run = DryRun(run, device=device, num_classes=num_classes, free_gradients=min(stages) >= 2)
    trace = dry_run.trace()
    return [
        step_memory(trace, zero_memory_of(run, dry_run.network, resolved, world_size=number, device=device))
        for number, resolved in settings.items()
    ]
