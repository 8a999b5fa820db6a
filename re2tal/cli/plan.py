"""`re2tal plan`: the memory of a training step by part, and how a budget would be spent, before any launch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from re2tal.config import AnyRun
from re2tal.files import output_file
from re2tal.options import COUNT, check
from re2tal.planning.choice import plan_step
from re2tal.runs.deepspeed_presets import DEFAULT_PRESET, find_preset
from re2tal.runs.devices import named_device
from re2tal.runs.planning_tables import print_forms, write_page
from re2tal.strict_json import write_json


def plan(
    *,
    run: Annotated[AnyRun, tyro.conf.arg(name="")],
    ds: str = DEFAULT_PRESET,
    ranks: int = 1,
    memory_budget_gb: float | Literal["auto"] | None = None,
    classes: int = 20,
    device: str | None = None,
    json: Path | None = None,
    forms: bool = False,
    write: Path | None = None,
) -> None:
    """Print the memory of a training step by part, without allocating it; with a budget, how its stages would run.

    It reads no weights and no shards. What is saved depends on the kernels of the device: plan where you will train.

    Args:
        run: the configuration, from --recipe NAME or --config FILE, with every field open to change
        ds: ZeRO stage, offload, communication: a preset, such as zero2, or the path of a DeepSpeed file
        ranks: how many processes share the optimizer
        memory_budget_gb: as --engine.memory-budget-gb, and in its place
        classes: how many classes the localizer tells apart
        device: "cpu" or "cuda"; the accelerator by default, where there is one
        json: a file for the figures, in bytes
        forms: print a table instead: plain, checkpointed, rewired and with adapters, on 1, 8 and 64 ranks
        write: a Markdown page in which the tables of chosen recipes are brought up to date, between their marks; of the
            other options none counts
    """
    json = json and output_file(json, option="--json")
    check("--ranks", ranks, COUNT)
    check("--classes", classes, COUNT)
    if write is not None:
        return write_page(write)
    if forms:
        return print_forms(run, ds, num_classes=classes, device=named_device(device))
    if memory_budget_gb is not None:
        run = replace(run, engine=replace(run.engine, memory_budget_gb=memory_budget_gb))
    planned = plan_step(run, find_preset(ds), world_size=ranks, num_classes=classes, device=named_device(device))
    print(planned)
    if json is not None:
        write_json(json, planned.to_json())
