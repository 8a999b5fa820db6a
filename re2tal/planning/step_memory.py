"""The memory of a whole training step by part, as a table and as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from re2tal.planning.rehearsal import Trace
from re2tal.planning.zero_memory import ZeroMemory


@dataclass(frozen=True, slots=True)
class StepMemory:
    """Bytes on the device of one rank at the moment when most are in use, and at others."""

    parts: dict[str, int]
    """What is there at the peak; they add up to it."""
    phases: dict[str, int]
    """The most of every phase of a step."""
    host: int
    """Bytes on the host, of what is offloaded."""

    @property
    def peak(self) -> int:
        """The most at once."""
        return max(self.phases.values())

    def to_json(self) -> dict[str, Any]:
        """Every figure in bytes."""
        return {"peak": self.peak, **asdict(self)}

    def __str__(self) -> str:
        head = [("at the peak", ""), *_rows(self.parts), ("peak", _gigabytes(self.peak))]
        if self.host:
            head.append(("on the host", _gigabytes(self.host)))
        return _table([*head, ("", ""), ("most while", ""), *_rows(self.phases)])


def step_memory(trace: Trace, zero: ZeroMemory) -> StepMemory:
    """From the activations of a step and what the optimizer and DeepSpeed hold."""
    standing = zero.during_backward
    names = {
        "start": "the batch is made ready",
        "forward": "the backbone goes forward",
        "between": "the localizer works",
        "backward": "the backbone goes backward",
    }
    phases = {
        name: standing + max(phase.peak for phase in trace.of(kind)) for kind, name in names.items() if trace.of(kind)
    }
    phases["the optimizer steps"] = zero.standing + zero.step
    parts = {"parameters": zero.parameters, "optimizer": zero.optimizer, "moving average": zero.average}
    if phases["the optimizer steps"] == max(phases.values()):
        parts |= {"gradients and optimizer's scratch": zero.step}
    else:
        parts |= {"gathered parameters": zero.gathered, "communication": zero.buckets, **_activations(trace, zero)}
    return StepMemory({name: size for name, size in parts.items() if size}, phases, zero.host)


def _activations(trace: Trace, zero: ZeroMemory) -> dict[str, int]:
    """What is there besides the optimizer at the highest moment of a step."""
    worst = max(trace.phases, key=lambda phase: phase.peak)
    kept = trace.kept()
    match worst.event.kind:
        case "start":
            states, inside = 0, "made while the batch is made ready"
        case "forward":
            states, inside = sum(kept[: worst.event.stage]), "inside a branch, forward"
        case "between":
            states, inside = sum(kept), "localizer"
        case "backward":
            states, inside = sum(kept[: worst.event.stage + 1]), "inside a branch, backward"
    batch = min(trace.batch, worst.live)
    parts = {
        "gradients": zero.gradients + worst.gradients,
        "batch": batch,
        "kept by the backbone's stages": states,
        inside: worst.peak - worst.live,
    }
    return {**parts, "other": zero.gradients + worst.peak - sum(parts.values())}


def _rows(sizes: dict[str, int]) -> list[tuple[str, str]]:
    return [(f"  {name}", _gigabytes(size)) for name, size in sizes.items()]


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:,.3f} GB"


def _table(rows: list[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in rows)
    right = max(len(size) for _, size in rows)
    return "\n".join(f"{name:<{width}}  {size:>{right}}".rstrip() for name, size in rows)
