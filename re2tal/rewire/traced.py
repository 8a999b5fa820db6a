"""The forward of a block as a graph of torch.fx, and a part of it as a function of its own."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from re2tal.rewire.escapes import other_generators, restore_other_generators


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
        before, given = tree_flatten((args, kwargs))
        output = self.block(x, *args, **kwargs)
        after, found = tree_flatten((args, kwargs))
        if given != found or any(one is not leaf for one, leaf in zip(after, before, strict=True)):
            raise RefusedError("it writes into a list or a mapping that it is called with")
        return output


class _Tracer(fx.Tracer):
    """Enters only the modules it is told to."""

    # Else what is computed from buffers alone would be computed once, when traced, and be a constant from then on.
    proxy_buffer_attributes = True

    def __init__(self, entered: Sequence[nn.Module]) -> None:
        super().__init__()
        self.entered = entered
        self.with_gradients = torch.is_grad_enabled()

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        """Whether the graph calls the module as a whole."""
        return not any(module is entered for entered in self.entered)

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *more: Any, **named: Any) -> fx.Proxy:
        """Raises RefusedError for what the graph would not hold: where gradients are switched off."""
        if torch.is_grad_enabled() != self.with_gradients:
            raise RefusedError("it switches gradients off for a part of what it computes (no_grad)")
        return super().create_proxy(kind, target, args, kwargs, *more, **named)


def trace(root: CalledBlock, entered: Sequence[nn.Module]) -> fx.Graph:
    """The graph of the block's forward.

    Raises RefusedError where it has none, draws to decide what it computes, or does what a graph does not hold.
    """
    tracer, others = _Tracer(entered), other_generators()
    try:
        with _without_autocast(), _custom_functions(tracer), _WithoutDraws():
            graph = tracer.trace(root)
        if other_generators() != others:
            raise RefusedError(_DRAWS)
    except RefusedError:
        raise
    except Exception as error:  # whatever the block's own code does when it meets a proxy instead of a tensor
        raise RefusedError(f"its forward cannot be traced: {type(error).__name__}: {error}") from error
    finally:
        restore_other_generators(others)
    held = [str(node.target) for node in graph.nodes if node.op == "get_attr"]
    if any(target.startswith("_tensor_constant") for target in held):
        raise RefusedError("it uses a tensor that is no argument and that no module holds")
    if not all(target.startswith("block.") for target in held):
        raise RefusedError("it uses an object that a graph does not hold (a random generator of its own?)")
    return graph


_DRAWS = "it draws a random number to decide what it computes (LayerDrop?)"


class _WithoutDraws(TorchDispatchMode):
    """Inside, drawing numbers raises RefusedError: a graph would hold them as constants."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs `func`."""
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise RefusedError(_DRAWS)
        return func(*args, **(kwargs or {}))


@contextmanager
def _without_autocast() -> Iterator[None]:
    """Inside, entering `torch.autocast` raises RefusedError: a graph would not hold it."""
    usual = torch.autocast.__enter__

    def enter(self: torch.autocast) -> None:
        raise RefusedError("it switches autocast on or off for a part of what it computes")

    torch.autocast.__enter__ = enter  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.autocast.__enter__ = usual  # type: ignore[method-assign]


@contextmanager
def _custom_functions(tracer: _Tracer) -> Iterator[None]:
    """Inside, a custom autograd Function is one node of the graph. Else its forward is traced, without its backward."""
    usual = vars(torch.autograd.Function)["apply"]

    def apply(cls: type[torch.autograd.Function], *args: Any, **kwargs: Any) -> Any:
        run = usual.__get__(None, cls)
        if not any(isinstance(leaf, fx.Proxy) for leaf in tree_leaves((args, kwargs))):
            return run(*args, **kwargs)

        def applied(*args: Any, **kwargs: Any) -> Any:
            return run(*args, **kwargs)

        applied.__name__, applied.__module__ = cls.__name__, cls.__module__  # for the code that is made of the graph
        return tracer.create_proxy("call_function", applied, args, kwargs)

    torch.autograd.Function.apply = classmethod(apply)  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        torch.autograd.Function.apply = usual  # type: ignore[method-assign]


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
