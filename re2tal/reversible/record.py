"""What the forward of a run records for its backward, besides the states that autograd saves.

    Recording       one per run: the run, the autocast state, and a record of every branch
    BranchRecord    one per branch: generator states, outputs or graphs, one entry per call of its function

A branch is called once, or once per piece. Backward takes the entries of a branch in the order in which forward added
them. Taking an entry removes it, so that its memory is free as soon as it was used.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from re2tal.reversible.buffers import SavedBuffer
from re2tal.reversible.replay_context import AutocastState
from re2tal.reversible.rng import GeneratorState
from re2tal.reversible.run import Run
from re2tal.reversible.saved_attention import KernelCalls, saving_attention


class Graph(NamedTuple):
    """What remains of a branch, or of a piece of one, that ran under autograd."""

    point: Tensor
    """The leaf that stands for its input. Its gradient appears here."""
    edge: GradientEdge | None
    """Its output's place in the graph; None where nothing wants a gradient. The output itself need not be kept."""
    dtype: torch.dtype
    """Of the output, so of the gradient that goes into `edge`."""

    @classmethod
    def of(cls, point: Tensor, update: Tensor) -> Graph:
        """The graph behind `update`, which was made from `point`."""
        return cls(point, get_gradient_edge(update) if update.requires_grad else None, update.dtype)


@dataclass(slots=True)
class BranchRecord:
    """What forward recorded of one branch: one entry per call of its function."""

    saves: Literal["nothing", "output", "graph"]
    """What forward saves of a call: its graph, its output, or neither: backward then runs it again."""
    draws: deque[GeneratorState | None] = field(default_factory=deque)
    """The generators before a call, for calls that backward runs again; None where the call drew nothing."""
    buffers: deque[list[SavedBuffer]] = field(default_factory=deque)
    """Before a call that backward runs again: the buffers that it wrote and may have read."""
    outputs: deque[Tensor] = field(default_factory=deque)
    """What a call returned, before rounding. Only where `saves` is "output"."""
    graphs: deque[Graph] = field(default_factory=deque)
    """Only where `saves` is "graph"."""
    attention: deque[KernelCalls] = field(default_factory=deque)
    """What attention kernels returned in a call, where forward saved that."""


@dataclass(slots=True)
class Recording:
    """What forward recorded of one run."""

    run: Run
    autocast: AutocastState
    """As forward saw it: backward may be called under another one."""
    branches: tuple[BranchRecord, ...]
    """One per branch of the run, in its order."""
    attention_left: int
    """How many more branches may save what their attention kernels return."""
    restored: list[SavedBuffer] = field(default_factory=list)
    """What backward has put back last. It is put back again before the next branch, which ran earlier, runs again."""
    x_wants_gradient: bool = False
    """Whether the run's input wants a gradient. Backward sets it: `autograd.grad` may not ask for this one."""

    @classmethod
    def begin(cls, run: Run, device: torch.device) -> Recording:
        """Empty, at the beginning of forward."""
        saving_output = set(run.branches_saving_output())

        def empty(index: int) -> BranchRecord:
            if index >= run.rebuilt:
                return BranchRecord("graph")
            return BranchRecord("output" if index in saving_output else "nothing")

        branches = tuple(map(empty, range(len(run.branches))))
        return cls(run, AutocastState.now(device), branches, run.saved_attention)

    @contextmanager
    def saving_attention(self, record: BranchRecord) -> Iterator[None]:
        """Inside, a call of the branch of `record` saves what its attention kernels return, if it is to do so.

        Which branches attend shows when they run: the first ones that do are those that save it.
        """
        if not (record.attention or self.attention_left):
            yield
            return
        calls: KernelCalls = deque()
        with saving_attention(calls):
            yield
        if record.attention:
            record.attention.append(calls)
        elif calls:
            record.attention.append(calls)
            self.attention_left -= 1
