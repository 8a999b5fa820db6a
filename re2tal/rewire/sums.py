"""The forward of a block as a graph, and that as a chain of sums, state -> state + F(state), from x to the output.

x -> add -> add -> output     read from the end: a sum has one term, the state before it, without which nothing else
                              that it adds would depend on x; the rest of the sum is F of that state
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_unflatten


class RefusedError(Exception):
    """Why an attempt to take a block apart failed."""


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """One branch: `code(holder of the block, state, tensors)` is what the block adds to a state."""

    name: str
    code: Callable[[Any, Tensor, Sequence[Tensor]], Tensor]
    uses_own_parameters: bool


def steps_of(block: nn.Module, leaves: list[Any], spec: Any, *, entered: Sequence[nn.Module]) -> list[Step]:
    """The branches of the forward of `block`, first to last; RefusedError where it is no chain of sums.

    Args:
        block: in the mode whose forward is meant.
        leaves: what it is called with besides x, flattened by `torch.utils._pytree`: tensors become inputs.
        spec: how to put the leaves together to (args, kwargs).
        entered: modules inside the block whose own forward belongs to the graph; others are called as a whole.
    """
    root = _Root(block, leaves, spec)
    graph = _trace(root, [block, *entered])
    x, tensors = (node for node in graph.nodes if node.op == "placeholder")
    state = _hidden_state(next(node for node in graph.nodes if node.op == "output").args[0])
    chain: list[tuple[fx.Node, list[fx.Node]]] = []
    while state is not x:
        chain.append(_split(state, x))
        state = chain[-1][0]
    if not chain:
        raise RefusedError("it returns its input")
    states = {x, *(state for state, _ in chain)}
    return [_extract(root, graph, added, states, tensors) for _, added in reversed(chain)]


def may_be_entered(module: nn.Module) -> bool:
    """Written by the block's authors, and without parameters of its own: its call, which gathers them, is skipped."""
    return not type(module).__module__.startswith("torch.") and not any(True for _ in module.parameters(recurse=False))


class _Root(nn.Module):
    """`block` called with the tensors among its further arguments as inputs, and the others as constants."""

    def __init__(self, block: nn.Module, leaves: list[Any], spec: Any) -> None:
        super().__init__()
        self.block, self.leaves, self.spec = block, leaves, spec

    def forward(self, x: Tensor, tensors: Sequence[Tensor]) -> Any:
        leaves = [tensors[i] if isinstance(leaf, Tensor) else leaf for i, leaf in enumerate(self.leaves)]
        args, kwargs = tree_unflatten(leaves, self.spec)
        return self.block(x, *args, **kwargs)


class _Tracer(fx.Tracer):
    """Enters only the modules it is told to."""

    proxy_buffer_attributes = True

    def __init__(self, entered: Sequence[nn.Module]) -> None:
        super().__init__()
        self.entered = entered

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return not any(module is entered for entered in self.entered)


def _trace(root: _Root, entered: Sequence[nn.Module]) -> fx.Graph:
    try:
        return _Tracer(entered).trace(root)
    except Exception as error:  # whatever the block's own code does when it meets a proxy instead of a tensor
        raise RefusedError(f"its forward cannot be traced: {type(error).__name__}: {error}") from error


def _hidden_state(output: Any) -> Any:
    """A block returns it alone, first in a tuple, or as `(hidden,) + others`."""
    if isinstance(output, fx.Node) and output.target is operator.add and isinstance(output.args[0], tuple):
        return output.args[0][0]
    return output[0] if isinstance(output, tuple) else output


def _split(total: Any, x: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
    """A sum as the state before it and what is added to that."""
    terms = [total]
    while any(_is_sum(term) for term in terms):
        first = next(index for index, term in enumerate(terms) if _is_sum(term))
        terms[first : first + 1] = terms[first].args
        for state in terms:
            added = [term for term in terms if term is not state]
            if (
                len(added) == len(terms) - 1
                and _reaches(state, x, {})
                and not any(_reaches(term, x, {state: False}) for term in added)
            ):
                return state, added
    raise RefusedError(f"its result is not its input and something added to it: it comes from {_source(total)}")


def _source(node: Any) -> str:
    """Where a value comes from, in words."""
    if not isinstance(node, fx.Node):
        return repr(node)
    if node.op == "call_module":
        return f"its module {str(node.target).removeprefix('block.')!r}"
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
    if node not in known:
        known[node] = not _is_metadata(node) and any(_reaches(source, x, known) for source in node.all_input_nodes)
    return known[node]


def _is_metadata(node: fx.Node) -> bool:
    """A question for shape, dtype or device: any state has the same answer."""
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] in ("shape", "dtype", "device", "ndim")
    return node.op == "call_method" and node.target in ("size", "dim")


def _extract(root: _Root, graph: fx.Graph, added: Sequence[fx.Node], states: set[fx.Node], tensors: fx.Node) -> Step:
    """The part of the graph that leads from a state to what is added to it."""
    needed: set[fx.Node] = set()
    pending = list(added)
    while pending:
        node = pending.pop()
        if node not in needed and node not in states and node is not tensors:
            needed.add(node)
            pending.extend(node.all_input_nodes)
    branch = fx.Graph()
    state = branch.placeholder("x")
    copies = dict.fromkeys(states, state) | {tensors: branch.placeholder("tensors")}
    for node in graph.nodes:  # in the order of the block, which is that of its random draws
        if node in needed:
            copies[node] = branch.node_copy(node, copies.__getitem__)
    total = copies[added[0]]
    for term in added[1:]:
        total = branch.call_function(operator.add, (total, copies[term]))
    branch.output(total)
    modules = [str(node.target).removeprefix("block.") for node in branch.nodes if node.op == "call_module"]
    own = {f"block.{name}" for name, _ in root.block.named_parameters(recurse=False)}
    return Step(
        name=" > ".join(modules) or str(total),
        code=type(fx.GraphModule(root, branch)).forward,
        uses_own_parameters=any(node.op == "get_attr" and node.target in own for node in branch.nodes),
    )
