"""Picks a setting for every rewired stage: the fastest combination that keeps the step within a number of bytes.

`options` lists the settings. Every plan that the search finds is checked by a dry run of the whole step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import ceil, floor, inf, log2
from pathlib import Path
from typing import Any

import torch
from torch import nn

from re2tal.backbones import stored
from re2tal.config import AnyRun, flatten, to_json
from re2tal.options import names_with
from re2tal.planning.calibration import link_bytes_per_second, measured_seconds
from re2tal.planning.dry_run import DryRun, Trace
from re2tal.planning.free_memory import free_memory
from re2tal.planning.options import (
    KEEPING,
    ON_THE_HOST,
    REBUILT,
    SAVING_ATTENTION,
    STORED,
    Choices,
    Link,
    options_of,
    undominated,
)
from re2tal.planning.search import Choice, Ground, Option, fastest, smallest
from re2tal.planning.settings import Setting, can_be_cut, configure, outputs_worth_saving
from re2tal.planning.step_memory import StepMemory, step_memory
from re2tal.planning.step_plan import GIGABYTE, StageSeconds, StepPlan
from re2tal.planning.zero_memory import Weights, ZeroMemory, zero_memory
from re2tal.training.config import DTYPES
from re2tal.training.zero_file import resolve_deepspeed_config

MOST_DRY_RUNS = 5


def made_for(
    run: AnyRun, settings: Mapping[str, Any], *, world_size: int, num_classes: int, device: torch.device
) -> dict[str, Any]:
    """The values that a plan depends on, by name, as JSON; `settings` are DeepSpeed's, resolved."""
    # Fields that are marked in the configuration's classes; a plan outlives a change of all others.
    names = set(names_with(run, "planned"))
    weighed = {name: value for name, value in flatten(to_json(run)) if name in names}
    return {
        **weighed,
        "training.average_decay is set": run.training.average_decay is not None,
        **{f"zero_optimization.{name}": value for name, value in flatten(settings["zero_optimization"])},
        "number of ranks": world_size,
        "number of classes": num_classes,
        "device": _name(device),
        "torch": torch.__version__,
    }


def _name(device: torch.device) -> str:
    return "cpu" if device.type == "cpu" else torch.get_device_module(device).get_device_name(device)


def plan_step(
    run: AnyRun, ds: Path, *, world_size: int, num_classes: int, device: torch.device, free_bytes: int | None = None
) -> StepPlan:
    """The memory of a training step; with `engine.memory_budget_gb`, also a setting for each stage of the backbone.

    `free_bytes`: the budget that "auto" stands for; by default the free memory of `device`, a CPU's divided by the
    ranks.

    Raises ValueError, with the smallest possible budget, where no plan fits.
    """
    settings = resolve_deepspeed_config(ds, run.engine, world_size=world_size)
    zero_stage, budget = settings["zero_optimization"].get("stage", 0), _budget(run, device, free_bytes, world_size)
    if budget is not None:
        _refuse_what_cannot_be_planned(run)
    # From ZeRO 2 on, a gradient goes into its bucket as soon as it is there.
    dry_run = DryRun(run, device=device, num_classes=num_classes, free_gradients=zero_stage >= 2)
    zero = zero_memory_of(run, dry_run.network, settings, world_size=world_size, device=device)
    purpose = made_for(run, settings, world_size=world_size, num_classes=num_classes, device=device)
    if budget is None:
        return StepPlan(step_memory(dry_run.trace(), zero), None, {}, {}, purpose)
    planner = _Planner(run, dry_run, zero, budget)
    found, memory, seconds = planner.plan()
    return StepPlan(memory, budget, found, seconds, purpose)


def zero_memory_of(
    run: AnyRun, network: nn.Module, settings: Mapping[str, Any], *, world_size: int, device: torch.device
) -> ZeroMemory:
    """What DeepSpeed holds of a step of `network`, besides activations; `settings` are resolved for as many ranks."""
    return zero_memory(
        Weights.of(network, run.optimizer, settings),
        settings,
        bytes_each=DTYPES[run.engine.precision].itemsize,
        world_size=world_size,
        averaged=run.training.average_decay is not None,
        on_cpu=device.type == "cpu",
    )


def _budget(run: AnyRun, device: torch.device, free_bytes: int | None, world_size: int) -> int | None:
    match run.engine.memory_budget_gb:
        case None:
            return None
        case "auto":
            return free_memory(device, sharers=world_size) if free_bytes is None else free_bytes
        case gigabytes:
            return floor(gigabytes * GIGABYTE)


def _refuse_what_cannot_be_planned(run: AnyRun) -> None:
    key, backbone = f"engine.memory_budget_gb is {run.engine.memory_budget_gb!r}", run.backbone
    if backbone.name == stored.NAME:
        raise ValueError(f"{key}, but a run on stored features has no backbone that could be rebuilt; leave it out")
    if not backbone.rewired:
        raise ValueError(f"{key}, but the backbone is not rewired, so nothing can be rebuilt; set backbone.rewired")
    if backbone.frozen:
        raise ValueError(f"{key}, but a frozen backbone keeps nothing; leave the budget out")
    if run.annealing.epochs > 0:
        raise ValueError(f"{key}, but annealing changes what is kept; leave annealing.epochs or the budget out")
    if backbone.clips_at_once is not None or backbone.trained_clips < 1:
        raise ValueError(
            f"{key}, but with backbone.clips_at_once {backbone.clips_at_once} and trained_clips "
            f"{backbone.trained_clips} its stages run many times a step, for which there are no plans; leave the "
            "budget out, or both of them"
        )
    if backbone.states == "int32":
        raise ValueError(
            f"{key}, but stages with backbone.states 'int32' cannot keep their activations, which a plan may want; set "
            "backbone.states to 'float32', or leave the budget out"
        )


class _Planner:
    """Counts the bytes and measures the time of every option, then searches."""

    def __init__(self, run: AnyRun, dry_run: DryRun, zero: ZeroMemory, budget: int) -> None:
        self.run, self.dry_run, self.zero, self.budget = run, dry_run, zero, budget
        self.stages = dry_run.stages()
        self._traces_by_settings: dict[tuple[Setting, ...], Trace] = {}

    def plan(self) -> tuple[dict[str, Setting], StepMemory, dict[str, StageSeconds]]:
        """The setting of each stage, the memory of the step, and the seconds of each stage.

        Raises ValueError, with the smallest possible budget, before anything is timed, where this one is too small.
        """
        traces = self._traces()
        # None on a CPU, whose memory is the host's.
        on_the_host = None if self.dry_run.device.type == "cpu" else self._traced([ON_THE_HOST] * len(self.stages))
        least = self._least(traces, on_the_host)
        measured = measured_seconds(
            self.run,
            list(traces),
            device=self.dry_run.device,
            plain_bytes=traces[STORED].peak,
            inside_bytes=_inside(traces[REBUILT]),
            order=list(self.stages),
        )
        seconds = dict(zip(traces, measured, strict=True))
        bandwidth = link_bytes_per_second(self.dry_run.device)
        link = None if on_the_host is None or bandwidth is None else Link(bandwidth, on_the_host)
        choices = options_of(self.stages, traces, seconds, link)
        chosen = self._search(traces[REBUILT].ground(), choices) or least  # which fits, however slow
        stored = dict(zip(self.stages, seconds[STORED], strict=True))
        found = dict(zip(self.stages, chosen, strict=True))
        planned = (dict(of_stage)[setting].seconds for of_stage, setting in zip(choices, chosen, strict=True))
        return (
            found,
            self._memory(chosen),
            {name: StageSeconds(one, stored[name]) for name, one in zip(self.stages, planned, strict=True)},
        )

    def _least(self, traces: Mapping[Setting, Trace], on_the_host: Trace | None) -> list[Setting]:
        """Settings that fit, however slow: one for all stages, or else those of the smallest plan."""
        # Each of these is a dry run that was made anyway.
        alike = [min(traces, key=lambda setting: traces[setting].peak)] * len(self.stages)
        if self._memory(alike).peak <= self.budget:
            return alike
        # Nothing is timed yet, and only bytes matter here.
        no_time = dict.fromkeys(traces, [0.0] * len(self.stages))
        link = None if on_the_host is None else Link(inf, on_the_host)
        choices = [undominated(of_stage) for of_stage in options_of(self.stages, traces, no_time, link)]
        settings = _settings_of(choices, smallest(traces[REBUILT].ground(), _options_of(choices)))
        memory = self._memory(settings)
        if memory.peak > self.budget:
            raise ValueError(_too_little(self.budget, memory))
        return settings

    def _search(self, ground: Ground, every: Sequence[Choices]) -> list[Setting] | None:
        """The settings of the fastest plan that fits in a dry run; None where none does."""
        choices, room = [undominated(of_stage) for of_stage in every], self.budget - self.zero.during_backward
        for _ in range(MOST_DRY_RUNS):
            found = fastest(ground, _options_of(choices), budget=room)
            if found is None:
                break
            settings = _settings_of(choices, found)
            excess = self._memory(settings).peak - self.budget
            if excess <= 0:
                return settings
            # The search takes options of stages for independent of each other; a dry run does not. Next time it gets
            # that much less.
            room -= excess
        settings = _settings_of(choices, smallest(ground, _options_of(choices)))
        return settings if self._memory(settings).peak <= self.budget else None

    def _memory(self, settings: Sequence[Setting]) -> StepMemory:
        return step_memory(self._traced(settings), self.zero)

    def _traces(self) -> dict[Setting, Trace]:
        """Dry runs with one setting for all stages; `options` interpolates between them.

        Pieces are a quarter and a 32nd of the largest branch. One dry run keeps the blocks that are not residual, and
        one saves attention, where there are any.
        """
        traces = {setting: self._traced([setting] * len(self.stages)) for setting in (REBUILT, STORED)}
        rebuilt = [REBUILT]
        if can_be_cut(self.stages):
            inside = _inside(traces[REBUILT])
            for part in (4, 32):
                mebibytes = 2.0 ** floor(log2(inside / part / 2**20))
                rebuilt.append(Setting(0, mebibytes))
        known = outputs_worth_saving(self.stages)
        settings = [replace(setting, known=number) for setting in rebuilt for number in sorted({0, known})]
        if any(stage.can_checkpoint_nonresidual() for stage in self.stages.values()):
            settings.append(KEEPING)
        traces |= {setting: self._traced([setting] * len(self.stages)) for setting in settings}
        saving = self._traced([SAVING_ATTENTION] * len(self.stages))
        # Networks without attention, or with one that is no fused kernel, save nothing by it.
        return traces | ({SAVING_ATTENTION: saving} if saving.kept() != traces[REBUILT].kept() else {})

    def _traced(self, settings: Sequence[Setting]) -> Trace:
        key = tuple(settings)
        if key not in self._traces_by_settings:
            configure(self.stages, settings)
            self._traces_by_settings[key] = self.dry_run.trace()
        return self._traces_by_settings[key]


def _too_little(budget: int, smallest: StepMemory) -> str:
    needed = ceil(1000 * smallest.peak / GIGABYTE) / 1000  # rounded up, so that it is a budget to give
    largest = sorted(smallest.parts.items(), key=lambda part: -part[1])[:3]
    return (
        f"engine.memory_budget_gb allows {budget / GIGABYTE:.3f} GB, but no plan of this step needs less than "
        f"{needed:.3f} GB, most of them {', '.join(f'{name} {size / GIGABYTE:.3f}' for name, size in largest)}; "
        "raise the budget, shard further (ZeRO stage, more ranks, offload, smaller buckets), or give it smaller or "
        "fewer clips"
    )


def _inside(rebuilt: Trace) -> int:
    """Most bytes inside a branch that runs whole."""
    return max(phase.peak - phase.live for phase in rebuilt.of("backward"))


def _options_of(choices: Sequence[Choices]) -> list[list[Option]]:
    return [[option for _, option in of_stage] for of_stage in choices]


def _settings_of(choices: Sequence[Choices], found: Choice) -> list[Setting]:
    return [of_stage[number][0] for of_stage, number in zip(choices, found.options, strict=True)]
