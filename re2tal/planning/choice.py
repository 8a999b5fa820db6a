"""A setting for every rewired stage, the fastest that keeps the whole step within a number of bytes.

Bytes come from steps on fake tensors, with all stages set alike: everything stored, everything rebuilt, and rebuilt in
pieces of a few sizes. Seconds come from the same steps on the device. In between, with the last k units of a run
stored, both are taken in proportion. What the search finds is rehearsed once more as a whole before it is believed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import floor, log2
from pathlib import Path
from typing import Any

import torch
from torch import nn

from re2tal.backbones import stored
from re2tal.config import RecognitionConfig, RunConfig
from re2tal.distributed import gather_objects, is_main
from re2tal.planning.calibration import measured_seconds
from re2tal.planning.rehearsal import Rehearsal, Trace, stages_of
from re2tal.planning.settings import Setting, can_be_cut, configure, longest_run
from re2tal.planning.step_memory import StepMemory, step_memory
from re2tal.planning.zero_memory import Weights, ZeroMemory, zero_memory
from re2tal.reversible.planner import Choice, Ground, Option, fastest, smallest
from re2tal.training.engine import DTYPES
from re2tal.training.zero_file import resolve_deepspeed_config

GIGABYTE = 10**9
SHARE_OF_FREE = 0.92
"""Of a card's free memory that "auto" takes: allocators round up, and kernels take workspaces."""
STORED = Setting(stored=None, chunk_mebibytes=None)
REBUILT = Setting(stored=0, chunk_mebibytes=None)
MOST_REHEARSALS = 5


@dataclass(frozen=True, slots=True)
class StepPlan:
    """How the stages of a step run, and the memory it needs."""

    memory: StepMemory
    budget: int | None
    """Bytes it was made for; None where everything runs as the configuration says."""
    settings: dict[str, Setting]
    """By name of the stage in the backbone; empty without a budget."""
    seconds: dict[str, tuple[float, float]]
    """By stage: seconds of its forward and backward as measured, and with everything stored."""

    def apply(self, network: nn.Module) -> None:
        """Sets the stages of the detector's, or recognizer's, backbone."""
        found = stages_of(network.get_submodule("backbone"))
        configure({name: found[name] for name in self.settings}, list(self.settings.values()))

    def to_json(self) -> dict[str, Any]:
        """Bytes and seconds."""
        return {
            "memory": self.memory.to_json(),
            "budget": self.budget,
            "stages": {name: asdict(setting) for name, setting in self.settings.items()},
            "seconds": {name: {"planned": own, "stored": least} for name, (own, least) in self.seconds.items()},
        }

    def __str__(self) -> str:
        if self.budget is None:
            return str(self.memory)
        rows = [("stage", "runs", "seconds", "if stored")]
        for name, setting in self.settings.items():
            own, least = self.seconds[name]
            rows.append((name, str(setting), f"{own:.3f}", f"{least:.3f}"))
        owns, leasts = zip(*self.seconds.values(), strict=True)
        rows.append(("all", "", f"{sum(owns):.3f}", f"{sum(leasts):.3f}"))
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        budget = (
            f"planned for {self.budget / GIGABYTE:.3f} GB, of which the step needs {self.memory.peak / GIGABYTE:.3f}"
        )
        return "\n".join([*lines, "", str(self.memory), "", budget])


def plan_step(
    run: RunConfig | RecognitionConfig,
    ds: Path,
    *,
    world_size: int,
    num_classes: int,
    device: torch.device,
    free_bytes: int | None = None,
) -> StepPlan:
    """The memory of a step of `run`; with `engine.memory_budget_gb`, after choosing how the backbone's stages run.

    `free_bytes`: what "auto" may take; by default what `device` has free now.

    Raises ValueError where no choice keeps within the budget, and says what the smallest one needs.
    """
    settings = resolve_deepspeed_config(ds, run.engine, world_size=world_size)
    stage, budget = settings["zero_optimization"].get("stage", 0), _budget(run, device, free_bytes)
    _refuse_what_cannot_be_rehearsed(run, device)
    if budget is not None:
        _refuse_what_cannot_be_planned(run)
    rehearsal = Rehearsal(run, device=device, num_classes=num_classes, free_gradients=stage >= 2)
    zero = zero_memory(
        Weights.of(rehearsal.network, run.optimizer, settings),
        settings,
        bytes_each=DTYPES[run.engine.precision].itemsize,
        world_size=world_size,
        averaged=run.training.average_decay is not None,
        on_cpu=device.type == "cpu",
    )
    if budget is None:
        return StepPlan(step_memory(rehearsal.trace(), zero), None, {}, {})
    return _Planner(run, rehearsal, zero, budget).plan()


def shared_plan(
    run: RunConfig | RecognitionConfig, ds: Path, *, world_size: int, num_classes: int, device: torch.device
) -> StepPlan:
    """Every rank calls this, before anything is on its device: all get the plan that rank 0 makes.

    "auto" is what the rank with the least has free.
    """
    free = None
    if run.engine.memory_budget_gb == "auto":
        free = min(gather_objects(free_memory(device)))
    plan, refusal = None, ""
    if is_main():
        try:
            plan = plan_step(run, ds, world_size=world_size, num_classes=num_classes, device=device, free_bytes=free)
        except ValueError as error:  # the other ranks must hear of it: they are waiting
            refusal = str(error)
    plan, refusal = gather_objects((plan, refusal))[0]
    if plan is None:
        raise ValueError(refusal)
    return plan


def free_memory(device: torch.device) -> int:
    """Bytes that "auto" may take of `device`. ValueError for a CPU, whose memory belongs to its other processes too."""
    if device.type == "cpu":
        raise ValueError(
            'engine.memory_budget_gb is "auto", but a CPU shares its memory with decoders and other processes; '
            "give a number of gigabytes"
        )
    return int(torch.get_device_module(device).mem_get_info(device)[0] * SHARE_OF_FREE)


def _budget(run: RunConfig | RecognitionConfig, device: torch.device, free_bytes: int | None) -> int | None:
    match run.engine.memory_budget_gb:
        case None:
            return None
        case "auto":
            return free_memory(device) if free_bytes is None else free_bytes
        case gigabytes:
            return floor(gigabytes * GIGABYTE)


def _refuse_what_cannot_be_rehearsed(run: RunConfig | RecognitionConfig, device: torch.device) -> None:
    if run.backbone.name == stored.NAME:
        raise ValueError(
            f"backbone.name is {stored.NAME!r}: a run on stored features has no network whose memory could be planned; "
            "give the recipe of one on videos, and leave engine.memory_budget_gb out of this one"
        )
    if run.backbone.offload and device.type != "cpu":
        raise ValueError(
            "backbone.offload is set, but bytes are counted wherever they lie, those on the host too; plan without it"
        )


def _refuse_what_cannot_be_planned(run: RunConfig | RecognitionConfig) -> None:
    key, backbone = f"engine.memory_budget_gb is {run.engine.memory_budget_gb!r}", run.backbone
    if not backbone.rewired:
        raise ValueError(f"{key}, but the backbone is not rewired, so nothing can be rebuilt; set backbone.rewired")
    if backbone.frozen:
        raise ValueError(f"{key}, but a frozen backbone keeps nothing; leave the budget out")
    if run.annealing.epochs > 0:
        raise ValueError(f"{key}, but what is kept changes with annealing; leave annealing.epochs or the budget out")
    if backbone.states == "int32":
        raise ValueError(
            f"{key}, but stages with backbone.states 'int32' cannot keep their activations, which a plan may want; set "
            "backbone.states to 'float32', or leave the budget out"
        )
    if backbone.offload:
        raise ValueError(f"{key}, which plans for the device alone; leave backbone.offload or the budget out")


class _Planner:
    """Rehearses and measures what the stages may do, and searches."""

    def __init__(self, run: RunConfig | RecognitionConfig, rehearsal: Rehearsal, zero: ZeroMemory, budget: int) -> None:
        self.run, self.rehearsal, self.zero, self.budget = run, rehearsal, zero, budget
        self.stages = rehearsal.stages()

    def plan(self) -> StepPlan:
        """ValueError with the smallest budget there is, where this one is too small."""
        traces = self._traces()
        measured = measured_seconds(
            self.run,
            list(traces),
            device=self.rehearsal.device,
            plain_bytes=traces[STORED].peak,
            order=list(self.stages),
        )
        seconds = dict(zip(traces, measured, strict=True))
        choices = [_options(traces, seconds, s, stage=stage) for s, stage in enumerate(self.stages.values())]
        options = [[option for _, option in choice] for choice in choices]
        ground = traces[REBUILT].ground()
        room = self.budget - self.zero.during_backward
        for _ in range(MOST_REHEARSALS):
            found = fastest(ground, options, budget=room)
            if found is None:
                break
            settings = [choice[number][0] for choice, number in zip(choices, found.options, strict=True)]
            memory = step_memory(self._rehearsed(settings), self.zero)
            if memory.peak <= self.budget:
                return self._plan(
                    settings, memory, [choice[n][1] for choice, n in zip(choices, found.options, strict=True)], seconds
                )
            room -= max(1, memory.peak - self.budget)
        settings, memory = self._smallest(ground, options, choices)
        self._refuse_too_much(memory)
        parts = [dict(choice)[setting] for choice, setting in zip(choices, settings, strict=True)]
        return self._plan(settings, memory, parts, seconds)

    def _plan(
        self,
        settings: Sequence[Setting],
        memory: StepMemory,
        options: Sequence[Option],
        seconds: dict[Setting, list[float]],
    ) -> StepPlan:
        return StepPlan(
            memory,
            self.budget,
            dict(zip(self.stages, settings, strict=True)),
            {
                name: (option.seconds, least)
                for name, option, least in zip(self.stages, options, seconds[STORED], strict=True)
            },
        )

    def _traces(self) -> dict[Setting, Trace]:
        """Steps with all stages set alike; pieces are a quarter and a 32nd of the largest branch."""
        traces = {setting: self._rehearsed([setting] * len(self.stages)) for setting in (REBUILT, STORED)}
        if can_be_cut(self.stages):
            inside = max(phase.peak - phase.live for phase in traces[REBUILT].of("backward"))
            for part in (4, 32):
                mebibytes = 2.0 ** floor(log2(inside / part / 2**20))
                setting = Setting(0, mebibytes)
                traces[setting] = self._rehearsed([setting] * len(self.stages))
        return traces

    def _rehearsed(self, settings: Sequence[Setting]) -> Trace:
        configure(self.stages, settings)
        return self.rehearsal.trace()

    def _smallest(
        self, ground: Ground, options: Sequence[Sequence[Option]], choices: Sequence[Sequence[tuple[Setting, Option]]]
    ) -> tuple[list[Setting], StepMemory]:
        found: Choice = smallest(ground, options)
        settings = [choice[number][0] for choice, number in zip(choices, found.options, strict=True)]
        return settings, step_memory(self._rehearsed(settings), self.zero)

    def _refuse_too_much(self, memory: StepMemory) -> None:
        if memory.peak > self.budget:
            raise ValueError(
                f"engine.memory_budget_gb allows {self.budget / GIGABYTE:.3f} GB, but no plan of this step needs less "
                f"than {memory.peak / GIGABYTE:.3f} GB, of which {self.zero.standing / GIGABYTE:.3f} GB are parameters "
                "and optimizer; raise the budget, shard further (ZeRO stage, more ranks, offload), or give it smaller "
                "or fewer clips"
            )


def _options(
    traces: dict[Setting, Trace], seconds: dict[Setting, list[float]], s: int, *, stage: Any
) -> list[tuple[Setting, Option]]:
    """Of one stage, those of which no other has less of everything."""
    stored = _measured(traces[STORED], seconds[STORED], s)
    found = [(STORED, stored)]
    length = longest_run(stage)
    # With many stages a few steps each are choice enough.
    steps = length if len(traces[STORED].of("forward")) <= 2 else min(length, 4)
    for setting, trace in traces.items():
        if setting == STORED:
            continue
        rebuilt = _measured(trace, seconds[setting], s)
        for step in range(steps):
            units = length * step // steps
            found.append((Setting(units, setting.chunk_mebibytes), _between(rebuilt, stored, units / length)))
    return [one for one in found if not any(_beats(other, one[1]) for _, other in found)]


def _measured(trace: Trace, seconds: list[float], s: int) -> Option:
    forward, backward = trace.of("forward")[s], trace.of("backward")[s]
    return Option(seconds[s], trace.kept()[s], forward.peak - forward.live, backward.peak - backward.live)


def _between(rebuilt: Option, stored: Option, share: float) -> Option:
    """With the last `share` of the units stored. They are free again when the others' backward comes."""
    kept = round(share * (stored.kept - rebuilt.kept))
    return Option(
        rebuilt.seconds + share * (stored.seconds - rebuilt.seconds),
        rebuilt.kept + kept,
        max(rebuilt.forward, rebuilt.kept + kept),
        max(stored.backward if share else 0, rebuilt.backward - kept),
    )


def _beats(one: Option, other: Option) -> bool:
    mine, its = ((of.seconds, of.kept, of.forward, of.backward) for of in (one, other))
    return mine != its and all(a <= b for a, b in zip(mine, its, strict=True))
