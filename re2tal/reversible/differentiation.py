"""Backward of one branch, whole or in pieces: run it again under autograd, rebuild a state, differentiate it.

Everything here consumes the `Recording` that forward left: a branch's records are gone once it was differentiated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor

from re2tal.reversible.chunking import GradientSums, Piece, last_of
from re2tal.reversible.linear import AddingProducts, AddProduct
from re2tal.reversible.record import Graph, Recording
from re2tal.reversible.rng import GeneratorState
from re2tal.reversible.run import BranchFunction
from re2tal.reversible.saved_attention import replaying_attention
from re2tal.reversible.skip_last_linear import without_last_linear


def differentiate(
    recording: Recording, index: int, state: Tensor, following: Tensor | None, gradient: Tensor
) -> Tensor:
    """Returns the gradient of x[i] through F_i, and turns x[i+1] into x[i-1] in place.

    Args:
        state: x[i]. Where F_i saved its graph, only its shape matters.
        following: x[i+1]; None if x[i-1] must not be rebuilt, because it was saved or F_{i-1} saved its graph.
        gradient: of x[i+1].
    """
    run, record = recording.run, recording.branches[index]
    if record.saves == "graph":
        graph = record.graphs.popleft()
    else:
        graph, update = _rebuilt(recording, index, run.branches[index], state, following)
        if following is not None and update is not None:
            run.coupling.released(run.precision.add(following, update, sign=-1), state)
        # Its memory is free for the backward below, which needs only the graph.
        del update
    if graph.edge is not None:
        # Under autocast a branch's output is narrower than the states; autograd wants its gradient in its own dtype.
        gradient = gradient.to(graph.dtype)
        torch.autograd.backward((graph.edge,), (gradient,))
    # No gradient: the output of this branch does not depend on its input.
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
    """Does the same piece by piece, and adds the gradient of x[i] through F_i to `to_state` instead of returning it."""
    sums = GradientSums()
    graphs = _graphs_of_pieces(recording, index, pieces, state, following, sums.add_product)
    for piece in pieces:
        # zip() would hold this graph, with its activations, while the next one is made: two pieces at once.
        graph = next(graphs)
        if graph.edge is not None:
            part = piece.take(gradient).to(graph.dtype)
            # Hooks of leaves must fire once per branch: all pieces but the last only add to sums.
            if piece is not pieces[-1]:
                sums.collect(graph.edge, part, graph.point)
            else:
                sums.deliver(graph.edge, part)
        if graph.point.grad is not None:
            piece.add_to(to_state, graph.point.grad)
        del graph
    # All pieces of F_i(x[i]) were subtracted by now; what is left of the inverse concerns the whole state.
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
    """Yields the graph of each piece: the saved one, or one made by running the piece again.

    Running a piece again also subtracts its output from `following`, where that is given.
    """
    record = recording.branches[index]
    if record.saves == "graph":
        while record.graphs:
            yield record.graphs.popleft()
        return
    for piece in pieces:
        with AddingProducts(add_product):
            graph, update = _rebuilt(recording, index, piece.function, piece.take(state), following, add_product)
        if following is not None and update is not None:
            piece.add_to(following, update, partial(recording.run.precision.add, sign=-1))
        # While the generator waits at `yield` it must hold neither: the caller frees the graph before the next piece.
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
    """Runs a branch (or piece) again under autograd. Returns its graph and, if x[i-1] must be rebuilt, its output.

    The last linear layer is skipped if nobody needs the output, or if forward saved it.
    """
    run, record = recording.run, recording.branches[index]
    draws, is_saved = record.draws.popleft(), record.saves == "output"
    # The call must find the buffers that it found in forward. So first undo what the later call wrote, which has just
    # run again, then put back what this call itself wrote.
    for saved in [*recording.restored, *record.buffers[0]]:
        saved.restore()
    recording.restored = record.buffers.popleft()
    if following is not None and not is_saved:
        point, update = run_with_graph(recording, index, run.output, function, state, draws)
        return Graph.of(point, update), update.detach()
    with without_last_linear(last_of(run.branches[index]), add_product=add_product):
        graph = Graph.of(*run_with_graph(recording, index, run.output, function, state, draws))
    return graph, record.outputs.popleft() if is_saved else None


def run_with_graph(
    recording: Recording,
    index: int,
    returned: Callable[[int, BranchFunction, Tensor], Tensor],
    function: BranchFunction,
    state: Tensor,
    draws: GeneratorState | None,
) -> tuple[Tensor, Tensor]:
    """Returns (leaf, output): a leaf copy of `state`, and `returned(index, function, leaf)` with its graph."""
    # Gradients of earlier branches' parameters go through every state but the first, whose gradient only the caller may
    # want.
    point = recording.run.precision.real(state).detach().requires_grad_(index > 0 or recording.x_wants_gradient)
    saved = recording.branches[index].attention
    attention = replaying_attention(saved.popleft()) if saved else nullcontext()
    # `replayed` turns the cache of autocast off. Branches that save their graph need that in forward
    # too: the cache may hold weights that were cast under no_grad, through which parameters would get no gradient.
    random = draws.replayed() if draws else nullcontext()
    with torch.enable_grad(), recording.autocast.replayed(), random, attention:
        return point, returned(index, function, point)
