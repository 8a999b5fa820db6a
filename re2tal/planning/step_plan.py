"""A plan: how the rewired stages of a step run, and the memory it needs, as a table and as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError
from torch import nn

from re2tal.planning.settings import Setting, configure
from re2tal.planning.step_memory import StepMemory
from re2tal.rewire import stages_of
from re2tal.strict_json import brief
from re2tal.tables import text_table

GIGABYTE = 10**9


@dataclass(frozen=True, slots=True)
class StageSeconds:
    """Seconds of a stage's forward and backward."""

    planned: float
    """As the plan has it."""
    stored: float
    """With everything stored."""


@dataclass(frozen=True, slots=True)
class StepPlan:
    """How the stages of a step run, and the memory it needs."""

    memory: StepMemory
    budget: int | None
    """The budget in bytes; None where all stages run as configured."""
    settings: dict[str, Setting]
    """Setting by name of the stage in the backbone; empty without a budget."""
    seconds: dict[str, StageSeconds]
    """Measured seconds by name of the stage."""
    made_for: dict[str, Any]
    """The JSON values that the plan depends on, by name."""

    def apply(self, network: nn.Module) -> None:
        """Sets the stages of the detector's, or recognizer's, backbone.

        Raises ValueError if it has others.
        """
        found = stages_of(network.get_submodule("backbone"))
        # A plan without a budget sets nothing, whatever the backbone.
        if self.settings and found.keys() != self.settings.keys():
            raise ValueError(
                f"the plan is for stages {list(self.settings)}, but this backbone has {list(found)}; plan anew"
            )
        configure({name: found[name] for name in self.settings}, list(self.settings.values()))

    def to_json(self) -> dict[str, Any]:
        """Bytes and seconds."""
        return {"peak": self.memory.peak, **asdict(self)}

    @classmethod
    def from_json(cls, document: Any) -> StepPlan:
        """Reads what `to_json` returned. Raises ValueError, with the key, for anything else."""
        if not isinstance(document, Mapping):
            raise ValueError(f"a plan is one JSON object, not {brief(document)}")
        try:
            # "peak" is written for readers; it follows from the phases.
            return TypeAdapter(cls).validate_python({key: document[key] for key in document if key != "peak"})
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            raise ValueError(f"{key} is {brief(first['input'])}: {first['msg']}") from None

    @property
    def headline(self) -> str:
        """The step in one line."""
        clips, size = self.made_for["engine.batch_size"], self.made_for["data.clips.size"]
        ranks, length = self.made_for["number of ranks"], self.made_for["data.clips.windowing.num_frames"]
        channels = self.made_for["backbone.feature_channels"]
        what = f"{length} frames of {size} x {size}" if channels is None else f"{length} steps of {channels} channels"
        return (
            f"{self.made_for['backbone.name']}, {clips} clip{'s' * (clips != 1)} of {what} in "
            f"{self.made_for['engine.precision']}, ZeRO {self.made_for.get('zero_optimization.stage', 0)} on {ranks} "
            f"rank{'s' * (ranks != 1)}, {self.made_for['device']}"
        )

    def __str__(self) -> str:
        if self.budget is None:
            return f"{self.headline}\n\n{self.memory}"
        rows = [("stage", "runs", "seconds", "if stored")]
        for name, setting in self.settings.items():
            seconds = self.seconds[name]
            rows.append((name, str(setting), f"{seconds.planned:.3f}", f"{seconds.stored:.3f}"))
        every = self.seconds.values()
        planned, stored = sum(one.planned for one in every), sum(one.stored for one in every)
        rows.append(("all", "", f"{planned:.3f}", f"{stored:.3f}"))
        budget = (
            f"planned for {self.budget / GIGABYTE:.3f} GB, of which the step needs {self.memory.peak / GIGABYTE:.3f}"
        )
        return "\n".join([self.headline, "", text_table(rows, align="<"), "", str(self.memory), "", budget])
