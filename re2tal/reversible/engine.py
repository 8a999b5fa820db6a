"""Runs a sequence of residual branches and forgets what is in between; backward rebuilds it, state by state.

    x[i+1] = x[i-1] + F_i(x[i]),   x[-1] = x[0] = x,   i = 0 .. n-1        then merge(x[n-1], x[n])

    forward     keeps x[n-1] and x[n], nothing else
    backward    for i = n-1 .. 0: runs F_i(x[i]) again, takes it from x[i+1] in place to get x[i-1], differentiates it

A coupling other than this sum has x[i] in it too, and cannot be inverted as well: more states are then kept, as many as
it takes, and backward inverts between them; see `coupling`.

One autograd Function spans the whole run. Inside its backward every branch gets a real, nested `backward()` that
accumulates into the leaves, so that the hooks which DDP and DeepSpeed put on modules and parameters see an ordinary
backward. Parameters are no inputs of the Function: ZeRO-3 keeps them partitioned, hence empty, outside their modules.
A `ChunkedBranch` is run piece by piece in all of this; see `chunking`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from re2tal.reversible.chunking import ChunkedBranch, GradientSums, Piece, last_of, pieces_of
from re2tal.reversible.coupling import SUM, Coupling, Merge
from re2tal.reversible.monitor import Monitor, Observation
from re2tal.reversible.precision import Grid, Precision, States
from re2tal.reversible.rng import GeneratorState
from re2tal.reversible.surroundings import AutocastState, BufferWatch, held, same_kernels
from re2tal.reversible.unfinished import unfinished

BranchFunction = Callable[[Tensor], Tensor]


def run_reversibly(
    branches: Sequence[BranchFunction],
    x: Tensor,
    *,
    recompute: bool = True,
    stored: int = 0,
    known: int = 0,
    merge: Merge = "mean",
    coupling: Coupling = SUM,
    states: States = "float32",
    grid: Grid = "auto",
    kinks: bool = False,
    owner: nn.Module | None = None,
    monitor: Monitor | None = None,
) -> Tensor:
    """Residual branches, coupled so that activations can be forgotten; values do not depend on `recompute`.

    Args:
        branches: F_0 .. F_{n-1}, each from a floating tensor to one of the same shape. Their input is lent: its buffer
            is used again as soon as they return. With none, `x` itself is returned. A `ChunkedBranch` is run in pieces.
        x: the first state, any shape. It is never written.
        recompute: forget activations and rebuild them in backward; otherwise keep them, as plain autograd does.
        stored: how many branches, counted from the end, keep their activations all the same.
        known: how many of the others keep what they added, so that the linear layer that they end in need not be
            computed again: the most expensive of those that have one, `WholeBranch.last`, later ones first.
        merge: "mean" is (x[n-1] + x[n]) / 2, the paper's; "extrapolate" is x[n-1] + x[n] - x, which is the plain
            residual network to first order, and exactly that network for n = 1, and for two whole blocks
            F(x) = block(x) - x.
        coupling: how states follow from the two before them; by default x[i+1] = x[i-1] + F_i(x[i]), as above. Others
            have merges of their own, and keep more states than two where inverting would lose too much; see `coupling`.
        states: the numbers that states are made of; see `precision`.
        grid: rounds states so that they are rebuilt to the last bit; see `precision`.
        kinks: whether the slope of a branch jumps somewhere, as ReLU's does: "auto" is then a grid in float32 too.
        owner: the module that holds every parameter and buffer that the branches use. Buffers that it writes in forward
            are held still in the rebuild, and where none of its parameters, nor `x`, wants a gradient, nothing is kept.
            Without it, a gradient is taken to be wanted and no buffer to be written.
        monitor: compares what is rebuilt with what was forgotten, in the steps that it chooses.

    Returns:
        The merged state, in the dtype of `x`; in float32 under autocast.

    Raises:
        ValueError: a branch changes shape or dtype, an option is none of the above, or "int32" states are to be trained
            while every branch keeps its activations.
        RuntimeError: in backward, when called twice or with `create_graph=True`: the activations are gone by then.

    Tensors that branches reach other than through their input must be leaves: parameters, or constants that want no
    gradient. A parameter used by two branches gets its gradient in two parts, which ZeRO-2 and ZeRO-3 refuse.
    """
    if merge not in get_args(Merge):
        raise ValueError(f"unknown merge {merge!r}; known: {list(get_args(Merge))}")
    if not x.is_floating_point():
        raise ValueError(f"a reversible run needs floating point states, got {x.dtype}; convert x first")
    if not branches:
        return x
    if stored < 0:
        raise ValueError(f"stored is {stored}; give the number of branches that keep their activations")
    if known < 0:
        raise ValueError(f"known is {known}; give the number of branches that keep what they added")
    rebuilt = len(branches) - stored if recompute else 0
    precision = Precision.of(x, grid, coupling, states=states, kinks=kinks)
    run = _Run(tuple(branches), max(0, rebuilt), known, merge, coupling, precision)
    is_trained = torch.is_grad_enabled() and (x.requires_grad or _is_trained(owner))
    if is_trained and not run.rebuilt and not precision.states.is_floating_point:
        raise ValueError("autograd keeps no gradient of int32 states; set recompute, or states to 'float32'")
    if not (run.rebuilt and is_trained):
        with same_kernels():
            return run.merged(*run.states(x, run.update)[:3])
    # Parameters are no inputs of the Function, and x may want no gradient: without an input that does, autograd would
    # leave the Function out, and the parameters would silently get nothing.
    anchor = torch.empty(0, device=x.device, requires_grad=True)
    return _Reversible.apply(x, anchor, run, owner, monitor.observe(x, precision) if monitor else None)


def _is_trained(owner: nn.Module | None) -> bool:
    return owner is None or any(parameter.requires_grad for parameter in owner.parameters())


Update = Callable[[int, BranchFunction, Tensor], Tensor]
"""i, F_i or a piece of it, x[i] or the same piece of it -> what that adds to x[i-1]."""


def _draws_of_pieces(branch: BranchFunction, device: torch.device) -> Iterator[AbstractContextManager[None]]:
    """Around each piece in turn: the generators as they stand, or as they stood before the first one."""
    start = GeneratorState.now(device) if isinstance(branch, ChunkedBranch) and branch.same_draws else None
    yield nullcontext()
    while True:
        yield start.replayed() if start else nullcontext()


@dataclass(frozen=True, slots=True)
class _Run:
    """The branches and the arithmetic of one run: shared by plain autograd, forward and backward."""

    branches: tuple[BranchFunction, ...]
    rebuilt: int
    """How many branches forget their activations; those behind them keep theirs."""
    known: int
    """How many of those keep what they added."""
    merge: Merge
    coupling: Coupling
    precision: Precision

    def kept(self) -> list[int]:
        """Which of the states before rebuilt branches backward gets, in rising order: the others it rebuilds."""
        return self.coupling.kept(self.rebuilt, room=self.precision.room)

    def known_branches(self) -> list[int]:
        """Which branches keep what they added: not those behind a kept state, before which nothing is rebuilt."""
        kept = {-1, *self.kept()}
        lasts = {index: last_of(self.branches[index]) for index in range(self.rebuilt) if index - 1 not in kept}
        sizes = {index: last.in_features * last.out_features for index, last in lasts.items() if last is not None}
        return sorted(sizes, key=lambda index: (sizes[index], index), reverse=True)[: self.known]

    def states(
        self, x: Tensor, update: Update, *, kept: Collection[int] = (), observation: Observation | None = None
    ) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """x[0], x[n-1] and x[n], and those that are to be kept.

        Where autograd does not watch, x[i+1] takes the buffer of x[i-1], unless it is kept or a stored branch's input.
        """
        start = previous = current = self.precision.state(x)
        needed = x if self.merge == "mean" else start
        found = []
        for index in range(len(self.branches)):
            if index in kept:
                found.append(current)
            if observation is not None:
                observation.see(index, current)
            lent = previous is current or previous is needed or index - 1 in kept or index > self.rebuilt
            owned = not (torch.is_grad_enabled() or lent)
            previous, current = current, self.following(index, previous, current, update, owned=owned)
        if len(self.branches) in kept:
            found.append(current)
        return start, previous, current, found

    def following(self, index: int, previous: Tensor, current: Tensor, update: Update, *, owned: bool) -> Tensor:
        """x[i-1], x[i] -> x[i+1]; in the buffer of x[i-1] where it is owned."""
        branch = self.branches[index]
        pieces = pieces_of(branch, current)
        # Updates get no name here: with one they would live on while the next one is computed.
        if not pieces:
            increment = self.precision.increment
            return self.coupling.advance(previous, current, increment(update(index, branch, current)), owned=owned)
        following = self.coupling.carried(previous, current, owned=owned)
        for piece, draws in zip(pieces, _draws_of_pieces(branch, current.device), strict=False):
            with draws:
                piece.add_to(following, self.precision.increment(update(index, piece.function, piece.take(current))))
        return following

    def update(self, index: int, function: BranchFunction, state: Tensor) -> Tensor:
        """F_i(x[i]), or of a piece of x[i], on the grid."""
        return self.precision.round(self.output(index, function, state))

    def output(self, index: int, function: BranchFunction, state: Tensor) -> Tensor:
        """The same as the branch returns it, checked."""
        output = function(self.precision.real(state).to(self.precision.branches))
        if not isinstance(output, Tensor) or output.shape != state.shape:
            given = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(
                f"{self._name(index)} turns a tensor of shape {tuple(state.shape)} into {given}; a residual branch "
                "returns one tensor of the shape of its input: leave this one outside the run"
            )
        if torch.promote_types(output.dtype, self.precision.branches) != self.precision.branches:
            raise ValueError(
                f"{self._name(index)} turns {self.precision.branches} into {output.dtype}; a residual branch keeps the "
                "dtype of its input: convert its output, or leave it outside the run"
            )
        return output

    def merged(self, start: Tensor, previous: Tensor, current: Tensor) -> Tensor:
        """What the run returns."""
        start, previous, current = (self.precision.real(state) for state in (start, previous, current))
        return self.coupling.merged(start, previous, current, merge=self.merge).to(self.precision.output)

    def _name(self, index: int) -> str:
        branch = self.branches[index]
        return f"branch {index} ({getattr(branch, 'name', None) or getattr(branch, '__name__', type(branch).__name__)})"


class _Reversible(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, anchor: Tensor, run: _Run, owner: nn.Module | None, observation: Observation | None
    ) -> Tensor:
        del anchor
        ctx.observation = observation
        ctx.run, ctx.autocast, ctx.draws, ctx.spent = run, AutocastState.now(x.device), [], False
        ctx.stored = {index: [] for index in range(run.rebuilt, len(run.branches))}
        ctx.outputs = {index: [] for index in run.known_branches()}

        def update(index: int, function: BranchFunction, state: Tensor) -> Tensor:
            if index in ctx.stored:
                point, output = _watched(ctx, index, run.update, function, state, None)
                ctx.stored[index].append(_Graph.of(point, output))
                return output.detach()
            before = GeneratorState.now(state.device)
            output = run.output(index, function, state)
            ctx.draws.append(None if before.same_as(GeneratorState.now(state.device)) else before)
            if index in ctx.outputs:
                ctx.outputs[index].append(output)  # as it came: in the narrower numbers, under autocast
            return run.precision.round(output)

        buffers = BufferWatch(owner)
        # Here x still says that it wants a gradient, which hooks of modules would believe.
        with same_kernels():
            start, previous, current, kept = run.states(x.detach(), update, kept=run.kept(), observation=observation)
        ctx.buffers = buffers.written()
        # Saved, not kept as attributes: an edit of x is noticed, and hooks on saved tensors see them.
        ctx.save_for_backward(*kept)
        return run.merged(start, previous, current)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "a reversible run forgets its activations, so it has no second derivatives: backward was called with "
                "create_graph=True; call it without, or run with recompute=False"
            )
        if ctx.spent:
            raise RuntimeError(
                "backward went through a reversible run twice, but the first time consumed its states; add the losses "
                "and call backward once, or run with recompute=False"
            )
        ctx.spent = True
        with held(ctx.buffers), same_kernels():
            return _backward(ctx, gradient.to(ctx.run.precision.gradients)), None, None, None, None


def _backward(ctx: Any, gradient: Tensor) -> Tensor | None:
    """Walks the states backwards: the parameters get their gradients on the way, x gets the one returned."""
    run: _Run = ctx.run
    length, coupling = len(run.branches), run.coupling
    kept = dict(zip(run.kept(), ctx.saved_tensors, strict=True))
    previous, current = kept.pop(run.rebuilt - 1), kept.pop(run.rebuilt, None)
    to_previous = to_current = coupling.gradient_of_end(gradient, merge=run.merge)
    for index in reversed(range(1, length)):
        owned = not (to_previous is to_current or to_previous is gradient)
        before = kept.pop(index - 1, None) if index < run.rebuilt else None
        following = current if before is None and index < run.rebuilt else None
        pieces = pieces_of(run.branches[index], previous)
        if pieces:
            to_previous = coupling.carried(to_previous, to_current, owned=owned)
            _differentiate_pieces(ctx, index, pieces, previous, following, to_current, to_previous)
            to_previous, to_current = to_current, to_previous
        else:
            to_input = _differentiate(ctx, index, previous, following, to_current)
            advanced = coupling.advance(to_previous, to_current, to_input, owned=owned)
            to_previous, to_current = to_current, advanced
            del to_input, advanced
        if index < run.rebuilt:
            previous, current = current if before is None else before, previous
    if ctx.observation is not None:
        ctx.observation.rebuilt(previous)
    pieces = pieces_of(run.branches[0], previous)
    if pieces:
        to_x = coupling.gradient_of_start(to_previous, to_current, gradient, merge=run.merge)
        del to_previous
        _differentiate_pieces(ctx, 0, pieces, previous, None, to_current, to_x)
        return to_x if ctx.needs_input_grad[0] else None
    to_input = _differentiate(ctx, 0, previous, None, to_current)
    if not ctx.needs_input_grad[0]:
        return None
    return coupling.gradient_of_start(to_previous, to_current, gradient, merge=run.merge).add_(to_input)


class _Graph(NamedTuple):
    """What remains of a branch, or of a piece of one, that autograd has watched."""

    point: Tensor
    """The leaf that stands for its input, where its gradient will be."""
    edge: GradientEdge | None
    """Its output's place in the graph; None where nothing wants a gradient. The output itself need not be kept."""
    dtype: torch.dtype

    @classmethod
    def of(cls, point: Tensor, update: Tensor) -> _Graph:
        return cls(point, get_gradient_edge(update) if update.requires_grad else None, update.dtype)


def _differentiate(ctx: Any, index: int, state: Tensor, following: Tensor | None, gradient: Tensor) -> Tensor:
    """x[i], x[i+1] and the gradient of x[i+1] -> the gradient of x[i] through F_i; x[i+1] becomes x[i-1] in place.

    `following` is None where x[i-1] is not to be rebuilt; of `state` only the shape matters where F_i is stored.
    """
    if index in ctx.stored:
        (graph,) = ctx.stored.pop(index)
    else:
        graph, update = _rebuilt(ctx, index, ctx.run.branches[index], state, ctx.draws.pop(), following)
        if following is not None and update is not None:
            ctx.run.coupling.rewind(following, state, update)
        del update  # which is free by then, since only its graph is needed
    if graph.edge is not None:
        gradient = gradient.to(graph.dtype)
        torch.autograd.backward((graph.edge,), (gradient,))
    return torch.zeros_like(graph.point) if graph.point.grad is None else graph.point.grad


def _differentiate_pieces(
    ctx: Any,
    index: int,
    pieces: Sequence[Piece],
    state: Tensor,
    following: Tensor | None,
    gradient: Tensor,
    to_state: Tensor,
) -> None:
    """The same piece by piece; what F_i gives to the gradient of x[i] is added to `to_state`."""
    sums, graphs = GradientSums(), _graphs_of_pieces(ctx, index, pieces, state, following)
    for piece in pieces:
        graph = next(graphs)  # not by zip, which would hold it while the next one is made
        if graph.edge is not None:
            part = piece.take(gradient).to(graph.dtype)
            if piece is not pieces[-1]:
                sums.collect(graph.edge, part, graph.point)
            else:
                sums.deliver(graph.edge, part)
        if graph.point.grad is not None:
            piece.add_to(to_state, graph.point.grad)
        del graph
    if following is not None:
        ctx.run.coupling.released(following, state)


def _graphs_of_pieces(
    ctx: Any, index: int, pieces: Sequence[Piece], state: Tensor, following: Tensor | None
) -> Iterator[_Graph]:
    """Of each piece in turn; what was forgotten is rebuilt when its turn comes, and taken from `following`."""
    if index in ctx.stored:
        stored = ctx.stored.pop(index)
        while stored:
            yield stored.pop(0)
        return
    draws = ctx.draws[-len(pieces) :]
    del ctx.draws[-len(pieces) :]
    for piece, before in zip(pieces, draws, strict=True):
        graph, update = _rebuilt(ctx, index, piece.function, piece.take(state), before, following)
        if following is not None and update is not None:
            piece.subtract_from(following, update)
        del update
        yield graph
        del graph


def _rebuilt(
    ctx: Any,
    index: int,
    function: BranchFunction,
    state: Tensor,
    draws: GeneratorState | None,
    following: Tensor | None,
) -> tuple[_Graph, Tensor | None]:
    """The graph of a branch, or of a piece of it, and what it added to the states, where x[i-1] is to be rebuilt.

    Where it is not, or where what was added was kept, the branch is not run to its end.
    """
    run: _Run = ctx.run
    outputs = ctx.outputs.get(index, ())
    if following is not None and not outputs:
        point, update = _watched(ctx, index, run.update, function, state, draws)
        return _Graph.of(point, update), run.precision.increment(update.detach())
    with unfinished(last_of(run.branches[index])):
        graph = _Graph.of(*_watched(ctx, index, run.output, function, state, draws))
    return graph, run.precision.increment(run.precision.round(outputs.pop(0))) if outputs else None


def _watched(
    ctx: Any,
    index: int,
    returned: Callable[[int, BranchFunction, Tensor], Tensor],
    function: BranchFunction,
    state: Tensor,
    draws: GeneratorState | None,
) -> tuple[Tensor, Tensor]:
    """A leaf with the values of `state`, and what is `returned` of the branch, or of a piece of it, with its graph."""
    point = ctx.run.precision.real(state).detach().requires_grad_(index > 0 or ctx.needs_input_grad[0])
    # Autocast without its cache, also in forward: there it may hold weights that were cast where no gradient is wanted.
    with torch.enable_grad(), ctx.autocast.replayed(), draws.replayed() if draws else nullcontext():
        return point, returned(index, function, point)
