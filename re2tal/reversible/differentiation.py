"""Backward of one branch, or of its pieces: runs it again under autograd, takes it from a state, differentiates it.

Everything here consumes the `Recording` that forward left: a branch's records are gone once it was differentiated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from re2tal.reversible.chunking import GradientSums, Piece, last_of
from re2tal.reversible.linear import AddingProducts, AddProduct
from re2tal.reversible.record import Graph, Recording
from re2tal.reversible.rng import GeneratorState
from re2tal.reversible.run import BranchFunction
from re2tal.reversible.skip_last_linear import without_last_linear


def differentiate(
    recording: Recording, index: int, state: Tensor, following: Tensor | None, gradient: Tensor
) -> Tensor:
    """x[i], x[i+1] and the gradient of x[i+1] -> the gradient of x[i] through F_i; x[i+1] becomes x[i-1] in place.

    `following` is None where x[i-1] is not to be rebuilt; of `state` only the shape matters where F_i is stored.
    """
    run, record = recording.run, recording.branches[index]
    if record.keeps == "graph":
        graph = record.graphs.popleft()
    else:
        graph, update = _rebuilt(recording, index, run.branches[index], state, following)
        if following is not None and update is not None:
            run.coupling.rewind(following, state, update)
        # Its memory is free for the backward below, which needs only the graph.
        del update
    if graph.edge is not None:
        gradient = gradient.to(graph.dtype)
        torch.autograd.backward((graph.edge,), (gradient,))
    return torch.zeros_like(graph.point) if graph.point.grad is None else graph.point.grad


def differentiate_pieces(
    recording: Recording,
    index: int,
    pieces: Sequence[Piece],
    state: Tensor,
    following: Tensor | None,
    gradient: Tensor,
    to_state: Tensor,
) -> None:
    """The same piece by piece; what F_i gives to the gradient of x[i] is added to `to_state`."""
    sums = GradientSums()
    graphs = _graphs_of_pieces(recording, index, pieces, state, following, sums.add_product)
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
        recording.run.coupling.released(following, state)


def _graphs_of_pieces(
    recording: Recording,
    index: int,
    pieces: Sequence[Piece],
    state: Tensor,
    following: Tensor | None,
    add_product: AddProduct,
) -> Iterator[Graph]:
    """Of each piece in turn; what was forgotten is rebuilt when its turn comes, and taken from `following`."""
    record = recording.branches[index]
    if record.keeps == "graph":
        while record.graphs:
            yield record.graphs.popleft()
        return
    for piece in pieces:
        with AddingProducts(add_product):
            graph, update = _rebuilt(recording, index, piece.function, piece.take(state), following, add_product)
        if following is not None and update is not None:
            piece.subtract_from(following, update)
        del update
        yield graph
        del graph


def _rebuilt(
    recording: Recording,
    index: int,
    function: BranchFunction,
    state: Tensor,
    following: Tensor | None,
    add_product: AddProduct | None = None,
) -> tuple[Graph, Tensor | None]:
    """The graph of a branch, or of a piece of it, and what it added to the states, where x[i-1] is to be rebuilt.

    Where it is not, or where what was added was kept, the branch is not run to its end.
    """
    run, record = recording.run, recording.branches[index]
    draws, is_known = record.draws.popleft(), record.keeps == "output"
    if following is not None and not is_known:
        point, update = watched(recording, index, run.update, function, state, draws)
        return Graph.of(point, update), run.precision.increment(update.detach())
    with without_last_linear(last_of(run.branches[index]), add_product=add_product):
        graph = Graph.of(*watched(recording, index, run.output, function, state, draws))
    return graph, run.precision.increment(run.precision.round(record.outputs.popleft())) if is_known else None


def watched(
    recording: Recording,
    index: int,
    returned: Callable[[int, BranchFunction, Tensor], Tensor],
    function: BranchFunction,
    state: Tensor,
    draws: GeneratorState | None,
) -> tuple[Tensor, Tensor]:
    """A leaf with the values of `state`, and what is `returned` of the branch, or of a piece of it, with its graph."""
    point = recording.run.precision.real(state).detach().requires_grad_(index > 0 or recording.x_wants_gradient)
    # Autocast without its cache, also in forward: there it may hold weights that were cast where no gradient is wanted.
    with torch.enable_grad(), recording.autocast.replayed(), draws.replayed() if draws else nullcontext():
        return point, returned(index, function, point)
