"""What a plan may decide about a rewired stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch.nn.modules.batchnorm import _BatchNorm

from re2tal.rewire import RewiredStage


@dataclass(frozen=True, slots=True)
class Setting:
    """How one stage runs; values are the same with all of them."""

    stored: int | None
    """How many units at the end of each run keep their activations; None for all."""
    chunk_mebibytes: float | None
    """About so much memory inside a branch; None runs branches whole."""
    offload: bool = False
    """Whether the states that runs keep wait for backward in host memory; only where no unit is stored."""

    def __str__(self) -> str:
        if self.stored is None:
            return "stored"
        how = "whole branches" if self.chunk_mebibytes is None else f"pieces of {self.chunk_mebibytes:g} MiB"
        besides = f", last {self.stored} stored" if self.stored else ", states on the host" if self.offload else ""
        return f"rebuilt, {how}{besides}"


def configure(stages: Mapping[str, RewiredStage], settings: Sequence[Setting]) -> None:
    """Gives each stage its setting."""
    for stage, setting in zip(stages.values(), settings, strict=True):
        stage.config = replace(
            stage.config,
            recompute=setting.stored is not None,
            stored=setting.stored or 0,
            chunk_mebibytes=setting.chunk_mebibytes,
            offload=setting.offload,
        )


def longest_run(stage: RewiredStage) -> int:
    """Units of the longest run of a stage."""
    return max(length for _, lengths in stage.runs() for length in lengths)


def can_be_cut(stages: Mapping[str, RewiredStage]) -> bool:
    """Whether branches can be run in pieces: they say how, and no normalisation takes its statistics over them."""
    for stage in stages.values():
        if stage.config.unit == "block":
            return False
        if any(isinstance(module, _BatchNorm) and module.training for module in stage.modules()):
            return False
    return any(
        branch.cut is not None
        for stage in stages.values()
        for residual in stage.residual.values()
        for branch in residual.branches
    )
