"""Backward of one branch, or of its pieces: runs it again under autograd, takes it from a state, differentiates it.

`ctx` is the autograd context of the engine's Function: the run, what forward recorded, and what it stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from re2tal.reversible.chunking import GradientSums, Piece, last_of
from re2tal.reversible.linear import AddingProducts, AddProduct
from re2tal.reversible.rng import GeneratorState
from re2tal.reversible.run import BranchFunction, Run
from re2tal.reversible.unfinished import unfinished


class Graph(NamedTuple):
    """What remains of a branch, or of a piece of one, that autograd has watched."""

    point: Tensor
    """The leaf that stands for its input, where its gradient will be."""
    edge: GradientEdge | None
    """Its output's place in the graph; None where nothing wants a gradient. The output itself need not be kept."""
    dtype: torch.dtype

    @classmethod
    def of(cls, point: Tensor, update: Tensor) -> Graph:
        """The graph behind `update`, which was made from `point`."""
        return cls(point, get_gradient_edge(update) if update.requires_grad else None, update.dtype)


def differentiate(ctx: Any, index: int, state: Tensor, following: Tensor | None, gradient: Tensor) -> Tensor:
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


def differentiate_pieces(
    ctx: Any,
    index: int,
    pieces: Sequence[Piece],
    state: Tensor,
    following: Tensor | None,
    gradient: Tensor,
    to_state: Tensor,
) -> None:
    """The same piece by piece; what F_i gives to the gradient of x[i] is added to `to_state`."""
    sums = GradientSums()
    graphs = _graphs_of_pieces(ctx, index, pieces, state, following, sums.add_product)
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
    ctx: Any,
    index: int,
    pieces: Sequence[Piece],
    state: Tensor,
    following: Tensor | None,
    add_product: AddProduct,
) -> Iterator[Graph]:
    """Of each piece in turn; what was forgotten is rebuilt when its turn comes, and taken from `following`."""
    if index in ctx.stored:
        stored = ctx.stored.pop(index)
        while stored:
            yield stored.pop(0)
        return
    draws = ctx.draws[-len(pieces) :]
    del ctx.draws[-len(pieces) :]
    for piece, before in zip(pieces, draws, strict=True):
        with AddingProducts(add_product):
            graph, update = _rebuilt(ctx, index, piece.function, piece.take(state), before, following, add_product)
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
    add_product: AddProduct | None = None,
) -> tuple[Graph, Tensor | None]:
    """The graph of a branch, or of a piece of it, and what it added to the states, where x[i-1] is to be rebuilt.

    Where it is not, or where what was added was kept, the branch is not run to its end.
    """
    run: Run = ctx.run
    outputs = ctx.outputs.get(index, ())
    if following is not None and not outputs:
        point, update = watched(ctx, index, run.update, function, state, draws)
        return Graph.of(point, update), run.precision.increment(update.detach())
    with unfinished(last_of(run.branches[index]), add_product=add_product):
        graph = Graph.of(*watched(ctx, index, run.output, function, state, draws))
    return graph, run.precision.increment(run.precision.round(outputs.pop(0))) if outputs else None


def watched(
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
