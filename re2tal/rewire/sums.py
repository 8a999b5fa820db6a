"""The forward of a block as a graph, and that as a chain of sums, state -> state + F(state), from x to the output.

x -> add -> add -> output     read from the end: a sum has one term, the state before it, without which nothing else
                              that it adds would depend on x; the rest of the sum is F of that state

A state may also be put together from pieces of the one before it, some with something added to them:

    cat(x[:, :1], x[:, 1:] + R)  =  x + cat(0, R)

or have something appended that is cut off again, (cat(x, m) + R)[:, :n] = x + R[:, :n], or be laid out in another way,
P(P'(x) + R) = x + P(R). That a cut or a layout gives the state back is taken for granted here, and checked in numbers.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import fx, nn

from re2tal.rewire.traced import CalledBlock, RefusedError, Step, step_of, sum_of, trace


def steps_of(block: nn.Module, leaves: list[Any], spec: Any, *, entered: Sequence[nn.Module]) -> list[Step]:
    """The branches of the forward of `block`, first to last; RefusedError where it is no chain of sums.

    Args:
        block: in the mode whose forward is meant.
        leaves: what it is called with besides x, flattened by `torch.utils._pytree`: tensors become inputs.
        spec: how to put the leaves together to (args, kwargs).
        entered: modules inside the block whose own forward belongs to the graph; others are called as a whole.
    """
    root = CalledBlock(block, leaves, spec)
    graph = trace(root, [block, *entered])
    x, tensors = (node for node in graph.nodes if node.op == "placeholder")
    output = next(node for node in graph.nodes if node.op == "output")
    _refuse_side_effects(graph, output)
    state = _hidden_state(output.args[0])
    layouts = {node for node in graph.nodes if _is_layout(root, node)}
    chain: list[_Sum] = []
    back: list[fx.Node] = []  # what lays the state out as the output, and as x
    while (state := _without_layouts(state, layouts, back)) is not x:
        before, added = _split(state, x, layouts)
        chain.append(_Sum(state, before, added, tuple(back)))
        state = before
    if not chain:
        raise RefusedError("it returns its input")
    chain.reverse()
    states, views, steps = {x}, {}, []
    for one in chain:
        if one.before in states:
            states.add(one.total)
            steps.append(one.added)
        else:  # it is laid out as the state before it
            views[one.total] = one.before
            steps.append([_laid_out(graph, term, one.back) for term in one.added])
    # A piece of a state is the same view of that state as it is of the one before, something added or not.
    views |= {piece.node: piece.view for state in states for piece in _pieces(state)}
    return [step_of(root, graph, added, states, tensors, views) for added in steps]


_WRITING = ("setitem", "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor")


def _refuse_side_effects(graph: fx.Graph, output: fx.Node) -> None:
    """Raises RefusedError for modules that are called, and tensors that are written, for nothing that is returned.

    Branches would leave that out: statistics, an auxiliary loss, a clamp in place.
    """
    used, pending = set(), [output]
    while pending:
        node = pending.pop()
        if node not in used:
            used.add(node)
            pending.extend(node.all_input_nodes)
    for node in graph.nodes:
        name = str(node.target if isinstance(node.target, str) else getattr(node.target, "__name__", ""))
        writes = name in _WRITING or (name.endswith("_") and not name.endswith("__")) or node.kwargs.get("inplace")
        if node not in used and (node.op == "call_module" or (node.op != "placeholder" and writes)):
            raise RefusedError(f"it calls {name.removeprefix('block.')} besides, for something that it does not return")


def _hidden_state(output: Any) -> Any:
    """A block returns it alone, first in a tuple, or as `(hidden,) + others`."""
    if isinstance(output, fx.Node) and output.target is operator.add and isinstance(output.args[0], tuple):
        return output.args[0][0]
    return output[0] if isinstance(output, tuple) else output


@dataclass(frozen=True, slots=True)
class _Sum:
    """A state as a sum."""

    total: fx.Node
    before: fx.Node
    """The state before it, as a term of the sum: it may be laid out in another way."""
    added: list[fx.Node]
    back: tuple[fx.Node, ...]
    """What lays `total` out as x."""


_LAYOUTS = {"reshape", "view", "flatten", "unflatten", "permute", "transpose", "movedim", "contiguous"}


def _is_layout(root: CalledBlock, node: fx.Node) -> bool:
    """Whether it holds the numbers of its first argument, and perhaps in another order."""
    if node.op == "call_module":
        return type(root.get_submodule(str(node.target))) is nn.Identity and len(node.args) == 1
    if not node.args or not isinstance(node.args[0], fx.Node) or any(isinstance(arg, torch.dtype) for arg in node.args):
        return False
    if node.op == "call_method" and node.target == "view":
        node.target = "reshape"  # of another state, which need not lie in memory as this one does
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    return node.op in ("call_method", "call_function") and name in _LAYOUTS


def _without_layouts(state: Any, layouts: set[fx.Node], back: list[fx.Node]) -> Any:
    """What `state` is a layout of; how it is laid out goes in front of `back`."""
    while isinstance(state, fx.Node) and state in layouts:
        back.insert(0, state)
        state = state.args[0]
    return state


def _laid_out(graph: fx.Graph, term: fx.Node, back: Sequence[fx.Node]) -> fx.Node:
    """`term` as x is laid out."""
    for layout in back:
        with graph.inserting_before(next(node for node in graph.nodes if node.op == "output")):
            replaced = {layout.args[0]: term}
            term = graph.node_copy(layout, partial(_replaced, replaced))
    return term


def _replaced(replaced: Mapping[Any, fx.Node], node: fx.Node) -> fx.Node:
    return replaced.get(node, node)


def _split(total: Any, x: fx.Node, layouts: set[fx.Node]) -> tuple[fx.Node, list[fx.Node]]:
    """A sum as the state before it and what is added to that."""
    if pieces := _pieces(total):
        return _split_pieces(total, pieces, x)
    if (parts := _split_cut(total, x)) is not None:
        return parts
    terms = [total]
    # Sums are opened one by one, the last of the forward first. So the state found is the latest one, and parallel
    # branches, x + A(x) + B(x), are one F.
    while any(_is_sum(term) for term in terms):
        first = next(index for index, term in enumerate(terms) if _is_sum(term))
        terms[first : first + 1] = terms[first].args
        for state in terms:
            added = [term for term in terms if term is not state]
            if (
                # The state is a term once: x + x is no skip. Without it nothing else may lead to x.
                len(added) == len(terms) - 1
                and _reaches(state, x, {})
                and not any(_reaches(term, x, _cut(state, layouts)) for term in added)
            ):
                return state, added
    raise RefusedError(f"its result is not its input and something added to it: it comes from {_source(total)}")


def _split_cut(total: Any, x: fx.Node) -> tuple[fx.Node, list[fx.Node]] | None:
    """(cat(state, more) + R)[:, :n] as the state and R[:, :n]; None for anything else."""
    if not (isinstance(total, fx.Node) and total.target is operator.getitem and _is_sum(total.args[0])):
        return None
    terms: list[Any] = list(total.args[0].args)  # type: ignore[union-attr]
    for cat in terms:
        if cat.target is torch.cat and cat.args and isinstance(cat.args[0], list | tuple):
            state, (added,) = cat.args[0][0], [term for term in terms if term is not cat]
            if not _reaches(added, x, {state: False}):
                with total.graph.inserting_before(total.next):
                    return state, [total.graph.call_function(operator.getitem, (added, total.args[1]))]
    return None


@dataclass(frozen=True, slots=True)
class _Piece:
    """One piece of a state that `torch.cat` puts together."""

    node: fx.Node
    view: fx.Node
    """The same stretch of the state before, of which this is a slice."""
    root: fx.Node
    """That state."""
    added: tuple[fx.Node, ...]
    """What is added to the view; () where the piece is the view."""


def _pieces(state: Any) -> list[_Piece]:
    """The pieces that `state` is put together from; [] where it is no such state."""
    is_cat = isinstance(state, fx.Node) and state.op == "call_function" and state.target is torch.cat
    if not is_cat or not isinstance(state.args[0], list | tuple):
        return []
    pieces = [_piece(node) for node in state.args[0]]
    found = [piece for piece in pieces if piece is not None]
    return found if len(found) == len(pieces) and len({piece.root for piece in found}) == 1 else []


def _piece(node: Any) -> _Piece | None:
    terms = list(node.args) if _is_sum(node) else [node]
    for view in terms:
        if (root := _root_of(view)) is not None:
            return _Piece(node, view, root, tuple(term for term in terms if term is not view))
    return None


def _root_of(view: Any) -> fx.Node | None:
    """What a chain of slices was taken from; None for anything else."""
    root = view
    while isinstance(root, fx.Node) and (
        (root.op == "call_function" and root.target is operator.getitem)
        or (root.op == "call_method" and root.target == "unsqueeze")
    ):
        root = root.args[0]
    return root if isinstance(root, fx.Node) and root is not view else None


def _split_pieces(state: fx.Node, pieces: Sequence[_Piece], x: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
    before = pieces[0].root
    if any(_reaches(term, x, {before: False}) for piece in pieces for term in piece.added):
        raise RefusedError("what it adds to a slice of a state depends on more than that state")
    graph = state.graph
    with graph.inserting_before(state.next):
        changes = [
            sum_of(graph, piece.added) if piece.added else graph.call_function(torch.zeros_like, (piece.view,))
            for piece in pieces
        ]
        return before, [graph.call_function(torch.cat, (changes, *state.args[1:]), state.kwargs)]


def _cut(state: fx.Node, layouts: set[fx.Node]) -> dict[fx.Node, bool]:
    """Nodes whose values follow from `state` alone: `_reaches` does not look behind them for x."""
    below: list[fx.Node] = []
    core = _without_layouts(state, layouts, below)
    return dict.fromkeys((core, *below), False) | {piece.node: False for piece in _pieces(state)}


def _source(node: Any) -> str:
    """Where a value comes from, in words."""
    if not isinstance(node, fx.Node):
        return repr(node)
    if node.op == "call_module":
        name = str(node.target).removeprefix("block.")
        return f"its module {name!r}" + (", a norm after the sum (post-norm)" if "norm" in name.lower() else "")
    if _is_sum(node):
        return "a sum, of which no term stands for the state before it"
    return f"{getattr(node.target, '__name__', node.target)}()"


def _is_sum(node: Any) -> bool:
    if not isinstance(node, fx.Node) or node.kwargs or len(node.args) != 2:
        return False
    if not all(isinstance(term, fx.Node) for term in node.args):
        return False
    if node.op == "call_function":
        return node.target in (operator.add, operator.iadd, torch.add)
    return node.op == "call_method" and node.target in ("add", "add_")


def _reaches(node: fx.Node, x: fx.Node, known: dict[fx.Node, bool]) -> bool:
    """Whether `node` depends on the values of `x`, other than through nodes that are `known` to be cut."""
    if node is x:
        return known.get(node, True)
    # `known` starts with the cuts, and remembers answers, or graphs with many skips would take exponential time.
    if node not in known:
        known[node] = not _is_metadata(node) and any(_reaches(source, x, known) for source in node.all_input_nodes)
    return known[node]


def _is_metadata(node: fx.Node) -> bool:
    """A question for shape, dtype or device: any state has the same answer."""
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] in ("shape", "dtype", "device", "ndim")
    return node.op == "call_method" and node.target in ("size", "dim")
