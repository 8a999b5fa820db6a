"""One plan for all ranks, and for all starts of a run.

Timings differ from start to start, and another plan may sum gradients in another order. So a resumed run goes on with
the plan in its folder, to the last bit, as long as what the plan depends on is the same.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from re2tal.config import AnyRun
from re2tal.distributed import made_by_main
from re2tal.planning.choice import made_for, plan_step
from re2tal.planning.free_memory import free_on_all_ranks
from re2tal.planning.step_plan import GIGABYTE, StepPlan
from re2tal.strict_json import brief, read_json, write_json
from re2tal.training.zero_file import resolve_deepspeed_config

# Raised when fields of a plan change their meaning: older files then lead to a new plan, not to an error.
FORMAT = 1


def shared_plan(
    run: AnyRun, ds: Path, *, world_size: int, num_classes: int, device: torch.device, earlier: Path | None = None
) -> StepPlan:
    """Every rank calls this, before anything is on its device: all get the plan that rank 0 makes, or its error.

    `earlier`: the file of a plan to reuse, if it exists and was made for this run; rank 0 says on stderr whether it is
    reused, or why not. "auto" is the free memory of the rank that has the least.
    """
    # Before rank 0 begins alone: it is a collective.
    free = free_on_all_ranks(device) if run.engine.memory_budget_gb == "auto" else None

    def make() -> StepPlan:
        if earlier is not None:
            settings = resolve_deepspeed_config(ds, run.engine, world_size=world_size)
            wanted = made_for(run, settings, world_size=world_size, num_classes=num_classes, device=device)
            plan, reason = _made_before(earlier, wanted, free=free)
            if plan is not None:
                print(f"the stages of the backbone run as in {earlier}", file=sys.stderr, flush=True)
                return plan
            print(f"planning anew: {reason}", file=sys.stderr, flush=True)
        return plan_step(run, ds, world_size=world_size, num_classes=num_classes, device=device, free_bytes=free)

    return made_by_main(make)


def save_plan(path: Path, plan: StepPlan) -> None:
    """For `shared_plan` at the next start; the file appears whole or not at all."""
    write_json(path, {"format": FORMAT, **plan.to_json()})


def _made_before(path: Path, purpose: dict[str, object], *, free: int | None) -> tuple[StepPlan | None, str]:
    """The plan in a file, or why it cannot be used."""
    if not path.exists():
        return None, f"there is no {path}"
    try:
        document = read_json(path)
        if not isinstance(document, dict) or document.pop("format", None) != FORMAT:
            raise ValueError(f"{path} is not a plan of format {FORMAT}")
    # A plan can always be made again: a broken file is a reason to do so, which is printed, not one to stop.
    except (OSError, ValueError) as error:
        return None, str(error)
    try:
        plan = StepPlan.from_json(document)
    except ValueError as error:
        return None, f"{path}: {error}"
    changes = [
        f"{name} is {brief(purpose.get(name))}, in {path} it is {brief(plan.made_for.get(name))}"
        for name in sorted(purpose.keys() | plan.made_for.keys())
        if purpose.get(name) != plan.made_for.get(name)
    ]
    if changes:
        return None, "; ".join(changes)
    # "auto" is the same word at every start, but less may be free now than at the first.
    if free is not None and plan.memory.peak > free:
        needed = f"the plan in {path} needs {plan.memory.peak / GIGABYTE:.3f} GB"
        return None, f"{needed}, but only {free / GIGABYTE:.3f} GB are free to take"
    return plan, ""
