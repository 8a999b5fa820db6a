"""How the residual blocks of a network are coupled, and what backward saves of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from re2tal.options import option
from re2tal.reversible.coupling import Merge
from re2tal.reversible.precision import GridStep, States, check_numbers

SAVING = ("chunk_mebibytes", "known", "saved_attention", "keep_nonresidual", "stored", "offload")
"""Fields that say how memory is spent, and change no value of the network."""


@dataclass(frozen=True, slots=True)
class RewiringConfig:
    """How the residual blocks of a network are coupled."""

    unit: Literal["branch", "block"] = option("branch", wiring=True)
    """What one F is: a branch of a block (the paper), or a whole block, F(x) = block(x) - x."""
    merge: Merge = option("mean", wiring=True)
    """What becomes of a run's two end states: their "mean" (the paper), or "extrapolate", y1 + y2 - x, which is nearer
    to the network before rewiring, and equal to it for a run of one block, or of two with `unit` "block"."""
    segment: int | None = option(None, wiring=True, of_rewired=True)
    """Merge and start again after this many units; None for one run per unbroken sequence of residual blocks. Fewer
    units are nearer to the network before rewiring, and need the memory of two states for each segment."""
    beta: float = option(1.0, wiring=True, of_rewired=True)
    """How far skips reach back: x[i+1] = F(x[i]) + (1 - beta) x[i] + beta x[i-1]. 1 is the paper's coupling; 0 is the
    network before rewiring, checkpointed (SlowFast's only with `unit` "block"); in between, after Dr2Net, a smaller
    beta keeps more states. The trained network is used with this value; `annealing` says how training gets there."""
    recompute: bool = True
    """Rebuild activations in backward instead of saving them, in rewired runs and in the layers between them. The
    values are the same."""
    stored: int = option(0, of_rewired=True, resumable=True, planned=False)
    """How many units at the end of each run save their activations: more memory, less to rebuild."""
    known: int = option(0, of_rewired=True)
    """How many branches of each run save their output, so that backward skips the linear layer that they end in. The
    most expensive such layers are chosen, in transformers those of MLPs. Each output takes the memory of a state, or
    half of it under bfloat16 and float16."""
    saved_attention: int = option(0, of_rewired=True)
    """How many branches of each run, from the first that has attention, save what their attention kernels return, so
    that backward does not run them again: one state each, or half of one under bfloat16 and float16."""
    keep_nonresidual: bool = option(False, of_rewired=True, resumable=True, planned=False)
    """Save the activations of blocks that are not residual, such as those that change resolution: more memory, and
    none of them is computed twice. Reversible runs are still rebuilt."""
    states: States = option("float32", of_rewired=True)
    """What the states of a run are made of: "float32" is rebuilt exactly on its grid, "int32" on any grid."""
    grid: GridStep = "auto"
    """Grid of the states that makes rebuilding exact: a step, None for none, or "auto": 2^-14 under bfloat16 and
    float16; in float32 2^-18 where branches have kinks, as ReLU has one, and none where they are smooth; for "int32"
    always 2^-16."""
    chunk_mebibytes: float | None = option(None, of_rewired=True)
    """Run a branch in pieces that each need about this much memory while they are differentiated: less memory, more and
    smaller kernels. Only branches that declare a `Cut` are cut, and SlowFast's only with `norm_eval`. None runs every
    branch whole."""
    monitor_every: int | None = option(100, resumable=True, planned=False)
    """Every N training forwards, compare a sample of the rebuilt states with the originals and warn if they differ.
    Every hundredth costs nothing that can be measured, and a network that drifts would train on wrong gradients
    silently. None: never."""
    offload: bool = option(False, of_rewired=True, resumable=True, planned=False)
    """Keep the end states of runs in host memory, and fetch them back ahead of their backward."""

    def __post_init__(self) -> None:
        if self.unit not in ("branch", "block"):
            raise ValueError(f"unit is {self.unit!r}; known: ['block', 'branch']")
        if self.merge not in get_args(Merge):
            raise ValueError(f"merge is {self.merge!r}; known: {list(get_args(Merge))}")
        if self.segment is not None and self.segment < 1:
            raise ValueError(f"segment is {self.segment}; give at least 1 unit, or None for no cut")
        if not 0 <= self.beta <= 1:
            raise ValueError(f"beta is {self.beta}; it lies in [0, 1]: 1 is the paper's coupling, 0 the plain network")
        check_numbers(self.states, self.grid)
        if self.monitor_every is not None and self.monitor_every < 1:
            raise ValueError(f"monitor_every is {self.monitor_every}; give a number of steps, or None for never")
        if self.states == "int32" and not self.recompute:
            raise ValueError(
                "states is 'int32', but recompute is not set: autograd keeps no gradient of integers; set recompute, "
                "or states to 'float32'"
            )
        if self.chunk_mebibytes is not None and not self.chunk_mebibytes > 0:
            raise ValueError(f"chunk_mebibytes is {self.chunk_mebibytes}; give more than 0, or None for whole branches")
        if self.chunk_mebibytes is not None and self.unit == "block":
            raise ValueError(
                f"chunk_mebibytes is {self.chunk_mebibytes}, but the whole blocks of unit 'block' cannot be cut; set "
                "unit to 'branch', or chunk_mebibytes to None"
            )
        for name, counted in (("stored", "units"), ("known", "branches"), ("saved_attention", "branches")):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; give a number of {counted}, 0 for none")
        if self.known and self.unit == "block":
            raise ValueError(
                f"known is {self.known}, but whole blocks, unit 'block', save nothing by it; set unit to "
                "'branch', or leave known out"
            )
        if self.offload and not (self.recompute and self.stored == 0):
            raise ValueError(
                f"offload is set with recompute {self.recompute} and stored {self.stored}: what is saved then are "
                "activations, not states; set recompute and no stored units, or leave offload out"
            )
