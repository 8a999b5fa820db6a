"""The settings of a rewired stage that a plan decides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from re2tal.rewire import RewiredStage
from re2tal.rewire.units import joins_pieces


@dataclass(frozen=True, slots=True)
class Setting:
    """How one stage runs; fields are called as in `RewiringConfig`. Results are the same with every setting."""

    stored: int | None
    """How many units at the end of each run keep their activations; None for all."""
    chunk_mebibytes: float | None
    """Memory of a piece of a branch, about; None runs branches whole."""
    known: int = 0
    """How many branches of each run save their output."""
    saved_attention: int = 0
    """How many branches of each run keep what their attention kernels returned."""
    offload: bool = False
    """Whether the end states of runs are kept in host memory; only where no unit is stored."""
    keep_nonresidual: bool = False
    """Whether blocks that are not residual keep their activations."""

    def __str__(self) -> str:
        if self.stored is None:
            return "stored"
        how = "whole branches" if self.chunk_mebibytes is None else f"pieces of {self.chunk_mebibytes:g} MiB"
        saved = f", {self.known} output{'s' * (self.known > 1)} saved" if self.known else ""
        saved += ", attention saved" if self.saved_attention else ""
        besides = f", last {self.stored} stored" if self.stored else ", states on the host" if self.offload else ""
        kept = ", non-residual blocks kept" if self.keep_nonresidual else ""
        return f"rebuilt, {how}{saved}{besides}{kept}"


def configure(stages: Mapping[str, RewiredStage], settings: Sequence[Setting]) -> None:
    """Gives each stage its setting."""
    for stage, setting in zip(stages.values(), settings, strict=True):
        rebuilt = setting.stored is not None
        stage.config = replace(stage.config, **{**asdict(setting), "recompute": rebuilt, "stored": setting.stored or 0})


def longest_run(stage: RewiredStage) -> int:
    """Units of the longest run of a stage."""
    return max(length for _, lengths in stage.runs() for length in lengths)


def outputs_worth_saving(stages: Mapping[str, RewiredStage]) -> int:
    """How many branches of a run end in a linear layer that is as large as any at the end of its stage's branches: in
    transformers the MLPs. The most of any stage."""
    return max(_ends(stage) for stage in stages.values())


def _ends(stage: RewiredStage) -> int:
    if stage.config.unit == "block":
        return 0
    lasts = [
        branch.last_in(stage.get_submodule(name))
        for name, residual in stage.residual.items()
        for branch in residual.branches
    ]
    sizes = [last.in_features * last.out_features for last in lasts if last is not None]
    # By size: a branch whose last layer is smaller saves less for the same bytes, and its output is not worth keeping.
    return min(sizes.count(max(sizes, default=0)), longest_run(stage))


def can_be_cut(stages: Mapping[str, RewiredStage]) -> bool:
    """Whether branches can be run in pieces: they say how, and no normalisation takes its statistics over them."""
    for stage in stages.values():
        if stage.config.unit == "block":
            return False
        if any(map(joins_pieces, stage.modules())):
            return False
    return any(
        branch.cut is not None
        for stage in stages.values()
        for residual in stage.residual.values()
        for branch in residual.branches
    )
