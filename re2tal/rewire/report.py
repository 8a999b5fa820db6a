"""What rewiring did to a network, in words; prints as a table."""

from __future__ import annotations

from dataclasses import dataclass

from re2tal.tables import text_table


@dataclass(frozen=True, slots=True)
class StageReport:
    """What became of one container of blocks."""

    name: str
    blocks: int
    rewired_blocks: int
    branches: tuple[str, ...]
    """Of one block each, such as "attention + mlp"; every kind once."""
    left_alone: tuple[str, ...]
    """One reason for each block, or group of blocks, that was not rewired."""


@dataclass(frozen=True, slots=True)
class RewireReport:
    """What `rewire` did to each container of blocks; prints as a table."""

    stages: tuple[StageReport, ...]
    ends: tuple[str, ...] = ()
    """Blocks behind which a run ends because the example uses the state there: more states are saved."""
    outside: tuple[str, ...] = ()
    """One reason for each group of modules outside of any stage, such as stems, that stay as they are."""

    def __str__(self) -> str:
        head = ("stage", "blocks", "rewired", "branches of a block", "left alone, because")
        rows = [
            (
                stage.name,
                str(stage.blocks),
                str(stage.rewired_blocks),
                ", ".join(stage.branches) or "-",
                "; ".join(stage.left_alone) or "-",
            )
            for stage in self.stages
        ]
        lines = [text_table([head, *rows], align="<")]
        if self.ends:
            lines += ["", "states are used in between, so runs also end behind:", f"  {', '.join(self.ends)}"]
        if self.outside:
            lines += ["", "outside of stages, left alone:", *(f"  {group}" for group in self.outside)]
        return "\n".join(lines)
