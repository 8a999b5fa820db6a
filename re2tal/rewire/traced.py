"""The forward of a block as a graph of torch.fx, and a part of it as a function of its own."""

from __future__ import annotations

import operator
import random
from collections.abc import Callable, Mapping, Sequence
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


def may_be_entered(module: nn.Module) -> bool:
    """Written by the block's authors, and without parameters of its own: its call, which gathers them, is skipped."""
    return not type(module).__module__.startswith("torch.") and not any(True for _ in module.parameters(recurse=False))


class CalledBlock(nn.Module):
    """`block` called with the tensors among its further arguments as inputs, and the others as constants."""

    def __init__(self, block: nn.Module, leaves: list[Any], spec: Any) -> None:
        super().__init__()
        self.block, self.leaves, self.spec = block, leaves, spec

    def forward(self, x: Tensor, tensors: Sequence[Tensor]) -> Any:
        """What the block returns."""
        leaves = [tensors[i] if isinstance(leaf, Tensor) else leaf for i, leaf in enumerate(self.leaves)]
        args, kwargs = tree_unflatten(leaves, self.spec)
        return self.block(x, *args, **kwargs)


class _Tracer(fx.Tracer):
    """Enters only the modules it is told to."""

    # Else what is computed from buffers alone would be computed once, when traced, and be a constant from then on.
    proxy_buffer_attributes = True

    def __init__(self, entered: Sequence[nn.Module]) -> None:
        super().__init__()
        self.entered = entered

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        """Whether the graph calls the module as a whole."""
        return not any(module is entered for entered in self.entered)


def trace(root: CalledBlock, entered: Sequence[nn.Module]) -> fx.Graph:
    """The graph of the block\'s forward. Raises RefusedError where it has none, or draws to decide what it computes."""
    draws = torch.get_rng_state(), random.getstate()
    try:
        graph = _Tracer(entered).trace(root)
        if not torch.equal(torch.get_rng_state(), draws[0]) or random.getstate() != draws[1]:
            raise RefusedError("it draws a random number to decide what it computes (LayerDrop?)")
        return graph
    except RefusedError:
        raise
    except Exception as error:  # whatever the block's own code does when it meets a proxy instead of a tensor
        raise RefusedError(f"its forward cannot be traced: {type(error).__name__}: {error}") from error
    finally:
        torch.set_rng_state(draws[0])
        random.setstate(draws[1])


def step_of(
    root: CalledBlock,
    graph: fx.Graph,
    added: Sequence[fx.Node],
    states: set[fx.Node],
    tensors: fx.Node,
    views: Mapping[fx.Node, fx.Node],
) -> Step:
    """The part of the graph that leads from a state to what is added to it; `views` stand for pieces of states."""
    needed: set[fx.Node] = set()
    pending = list(added)
    while pending:
        node = pending.pop()
        if node not in needed and node not in states and node is not tensors:
            needed.add(node)
            view = views.get(node, node)
            # Of a piece of a later state only the view of x is copied, not what was added to it.
            pending.extend(node.all_input_nodes if view is node else [view])
    branch = fx.Graph()
    state = branch.placeholder("x")
    copies = dict.fromkeys(states, state) | {tensors: branch.placeholder("tensors")}
    for node in graph.nodes:  # in the order of the block, which is that of its random draws
        if node in needed:
            view = views.get(node, node)
            copies[node] = branch.node_copy(node, copies.__getitem__) if view is node else copies[view]
    total = sum_of(branch, [copies[term] for term in added])
    branch.output(total)
    modules = [str(node.target).removeprefix("block.") for node in branch.nodes if node.op == "call_module"]
    own = {f"block.{name}" for name, _ in root.block.named_parameters(recurse=False)}
    return Step(
        name=" > ".join(modules) or str(total),
        code=type(fx.GraphModule(root, branch)).forward,
        uses_own_parameters=any(node.op == "get_attr" and node.target in own for node in branch.nodes),
    )


def sum_of(graph: fx.Graph, terms: Sequence[fx.Node]) -> fx.Node:
    """Adds `terms` in a graph."""
    total = terms[0]
    for term in terms[1:]:
        total = graph.call_function(operator.add, (total, term))
    return total
