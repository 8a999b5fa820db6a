"""Where the reversible runs over the blocks of a stage begin and end, how they are coupled, and what they save.

    blocks      downsampling | residual residual residual | another | born reversible, born reversible
    runs                       [..... segments .......]               [.........................]

A run ends where the next block is not residual, holds its streams otherwise, or where somebody uses the state; and
where `RewiringConfig.segment` says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from re2tal.reversible.coupling import SUM, Coupling
from re2tal.reversible.precision import StateFormat

if TYPE_CHECKING:
    from re2tal.rewire.config import RewiringConfig
    from re2tal.rewire.stage import RewiredStage


def coupling_of(config: RewiringConfig, *, streams: int | None) -> Coupling:
    """alpha = 1 - beta, so that states neither grow nor shrink. Streams are coupled as they were born."""
    return SUM if streams is not None else Coupling(1 - config.beta, config.beta)


def bounds_of(config: RewiringConfig, units: Sequence[nn.Module], *, streams: int | None) -> list[int]:
    """Where reversible runs over these units begin, and the end; `units` holds the block of each.

    At beta 0 blocks before the first trained one are a run of their own. It keeps nothing where x wants no gradient,
    and a run that ends changes nothing there, as it ends in the last of its states.
    """
    total = len(units)
    if streams is not None:
        return [0, total]
    frozen = _num_frozen(config, units)
    start = frozen if frozen < total else 0
    return sorted({0, *range(start, total, config.segment or total), total})


def _num_frozen(config: RewiringConfig, units: Sequence[nn.Module]) -> int:
    if config.beta != 0:
        return 0
    trained = [any(one.requires_grad for one in block.parameters()) for block in units]
    return trained.index(True) if any(trained) else len(trained)


def names_of_runs(stage: RewiredStage) -> Iterator[list[str]]:
    """The blocks of each unbroken residual sequence."""
    names: list[str] = []
    ends = stage.run_ends()
    for name in stage.names():
        names += [name] if name in stage.residual else []
        if name in ends:
            yield names
            names = []


def lengths_of_runs(stage: RewiredStage, names: Sequence[str]) -> list[int]:
    """The number of units in each reversible run over a sequence of blocks.

    A first run in which nothing is trained is left out: it keeps nothing.
    """
    config, streams = stage.config, stage.residual[names[0]].streams
    units = []
    for name in names:
        number = 1 if config.unit == "block" and streams is None else len(stage.residual[name].branches)
        units += [stage.get_submodule(name)] * number
    lengths = [last - first for first, last in pairwise(bounds_of(config, units, streams=streams))]
    return lengths[1:] if streams is None and _num_frozen(config, units) in range(1, len(units)) else lengths


class StateCount(NamedTuple):
    """States of all runs of a network, in one forward."""

    kept: int
    """Kept for backward, which rebuilds the others."""
    needed: int
    """Inputs of functions: what backward needs, and checkpointing every function would keep."""


def state_count(stage: RewiredStage) -> StateCount:
    """For states of the dtype of the parameters, outside of autocast."""
    config, x = stage.config, torch.empty(0, dtype=next(stage.parameters()).dtype)
    room = StateFormat.of(x, config.grid, states=config.states, kinks=stage.kinks).room
    kept = needed = 0
    for names in names_of_runs(stage):
        coupling = coupling_of(config, streams=stage.residual[names[0]].streams)
        for length in lengths_of_runs(stage, names):
            rebuilt = length - config.stored if config.recompute else 0
            kept += len(coupling.saved_states(rebuilt, room=room)) if rebuilt > 0 else 0
            needed += length
    return StateCount(kept, needed)
