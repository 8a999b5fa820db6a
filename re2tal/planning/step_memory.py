"""The memory of a whole training step by part, as a table and as JSON."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from re2tal.planning.dry_run import Trace
from re2tal.planning.zero_memory import ZeroMemory
from re2tal.tables import text_table

STATES, CHUNK, SCRATCH = "states, stored activations", "chunk in a branch", "optimizer's scratch"
STEPPING = "the optimizer steps"
WHILE = {
    "start": "the batch is prepared",
    "forward": "the backbone goes forward",
    "between": "the localizer works",
    "backward": "the backbone goes backward",
}


@dataclass(frozen=True, slots=True)
class StepMemory:
    """Bytes on the device of one rank by part: over a step, and at its peak."""

    parts: dict[str, int]
    """Bytes of each part at the peak; they add up to it."""
    most: dict[str, int]
    """The most bytes of each part, each at its own time."""
    phases: dict[str, int]
    """The most bytes in each phase of a step."""
    host: int
    """Bytes in host memory, of what is offloaded."""
    loading: int = 0
    """The most before the first step, while the weights come to the device."""

    @property
    def peak(self) -> int:
        """The most at once."""
        return max(self.phases.values())

    def to_json(self) -> dict[str, Any]:
        """Every figure in bytes."""
        return {"peak": self.peak, **asdict(self)}

    def __str__(self) -> str:
        # Small models on a CPU would be rows of 0.000 GB.
        unit, digits, name_of = (10**9, 3, "GB") if self.peak >= 10**9 else (10**6, 2, "MB")

        def size(number: int) -> str:
            return f"{number / unit:,.{digits}f} {name_of}" if number else "-"

        rows = [("part", "most", "at the peak")]
        rows += [(name, size(self.most[name]), size(self.parts.get(name, 0))) for name in self.most]
        rows.append(("all", "", size(self.peak)))
        if self.host:
            rows.append(("on the host", size(self.host), ""))
        loading = [("the weights come to the device", size(self.loading))] if self.loading else []
        phases = [("most while", ""), *loading, *((name, size(most)) for name, most in self.phases.items())]
        return f"{text_table(rows, align='<>')}\n\n{text_table(phases, align='<>')}"


def step_memory(trace: Trace, zero: ZeroMemory) -> StepMemory:
    """Adds the activations of a step to what the optimizer and DeepSpeed hold."""
    phases = {
        name: zero.during_backward + max(phase.peak for phase in trace.of(kind))
        for kind, name in WHILE.items()
        if trace.of(kind)
    }
    # Activations are free by then.
    phases[STEPPING] = zero.standing + zero.step
    standing = {"parameters": zero.parameters, "optimizer": zero.optimizer, "moving average": zero.average}
    always = {"gathered parameters": zero.gathered, "communication": zero.buckets}
    if phases[STEPPING] == max(phases.values()):
        parts = {**standing, "gradients": zero.step_gradients, SCRATCH: zero.step_scratch}
    else:
        parts = {**standing, **always, **_at_the_peak(trace, zero)}
    most = {**standing, **always, **_most(trace, zero), "other": parts.get("other", 0)}
    return StepMemory(
        {name: size for name, size in parts.items() if size},
        {name: size for name, size in most.items() if size},
        phases,
        zero.host + trace.host,
        zero.loading,
    )


def _at_the_peak(trace: Trace, zero: ZeroMemory) -> dict[str, int]:
    """Bytes by part at the peak of a step, without what the optimizer holds."""
    worst = max(trace.phases, key=lambda phase: phase.peak)
    kept, s, rise = trace.kept(), worst.event.stage, worst.peak - worst.live
    batch = trace.batch - (trace.prepared_again if worst.event.kind == "backward" else 0)
    # Frames may have been freed by then, where the backbone prepares them again.
    batch = min(batch, worst.peak)
    match worst.event.kind:
        case "start":
            inside = {"augmentation": worst.peak - batch}
        case "forward":
            # Of what the forward of a stage adds, what it will keep counts as states, and only the rest as one branch's
            # inside.
            inside = {STATES: sum(kept[:s]) + min(kept[s], rise), CHUNK: max(0, rise - kept[s])}
        case "between":
            inside = {STATES: sum(kept), "localizer": rise}
        case "backward":
            inside = {STATES: sum(kept[: s + 1]), CHUNK: rise}
    parts = {"gradients": zero.gradients + worst.gradients, "batch": batch, **inside}
    # What no part explains is shown, so that the table adds up to the peak.
    return {**parts, "other": zero.gradients + worst.peak - sum(parts.values())}


def _most(trace: Trace, zero: ZeroMemory) -> dict[str, int]:
    kept = trace.kept()
    forward = (max(0, phase.peak - phase.live - kept[s]) for s, phase in enumerate(trace.of("forward")))
    return {
        "gradients": max(zero.step_gradients, zero.gradients + trace.gradients),
        SCRATCH: zero.step_scratch,
        "batch": trace.batch,
        "augmentation": max(phase.peak for phase in trace.of("start")) - trace.batch,
        STATES: sum(kept),
        CHUNK: max([*forward, *_rises(trace.of("backward"))]),
        "localizer": max(_rises(trace.of("between"))),
    }


def _rises(phases: Iterable[Any]) -> list[int]:
    return [phase.peak - phase.live for phase in phases]
