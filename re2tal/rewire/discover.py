"""Takes a block apart that nobody registered: finds x + F(x) in its forward, and checks what it found on the spot.

    hidden = x + attention(norm1(x))         x -> [+] -> [+] -> output
    return hidden + mlp(norm2(hidden))       from the end: each sum has a term, the state before it, through which
                                             everything else that it adds depends on x; the rest of the sum is a branch

The forward is traced by torch.fx, in training and in evaluation mode, with the modules inside the block left whole, so
that a branch calls them as the block does. Where a sum hides inside one of them (`self.output(hidden, residual)`), that
one is entered too. What was found is run against the block itself before anybody gets it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from re2tal.reversible.rng import GeneratorState
from re2tal.reversible.surroundings import held
from re2tal.rewire.branches import Branch, NotResidual, Residual


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """How a block was called: `block(x, *args, **kwargs)`."""

    x: Tensor
    args: tuple
    kwargs: dict[str, Any]


def record_calls(model: nn.Module, blocks: Iterable[nn.Module], *, example: Sequence[Any]) -> dict[nn.Module, Call]:
    """How each of `blocks` is called when `model(*example)` runs; those not called with a tensor first are left out."""
    calls: dict[nn.Module, Call] = {}

    def record(block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if args and isinstance(args[0], Tensor):
            calls.setdefault(block, Call(args[0].clone(), args[1:], kwargs))

    handles = [block.register_forward_pre_hook(record, with_kwargs=True) for block in blocks]
    try:
        with _mode(model, training=False), torch.no_grad():
            model(*example)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def take_apart(block: nn.Module, call: Call) -> Residual | NotResidual:
    """The branches found in the forward of `block`, or why there are none.

    They take what the block takes: tensors of any size where `call` has tensors, and its constants.
    """
    children = [child for child in block.children() if _may_be_entered(child)]
    refusals = []
    for entered in ([], *([child] for child in children), children):
        try:
            return _take_apart(block, call, entered)
        except _RefusedError as refusal:
            refusals.append(str(refusal))
    return NotResidual(refusals[0])


class _RefusedError(Exception):
    """Why one attempt to take a block apart failed."""


def _take_apart(block: nn.Module, call: Call, entered: Sequence[nn.Module]) -> Residual:
    leaves, spec = tree_flatten((call.args, call.kwargs))
    root = _Root(block, leaves, spec)
    steps = {}
    for training in (True, False):
        with _mode(block, training=training):
            steps[training] = _steps(root, _trace(root, [block, *entered]))
    if [step.name for step in steps[True]] != [step.name for step in steps[False]]:
        raise _RefusedError("it adds other branches in training than in evaluation")
    branches = tuple(
        Branch(training.name, _function(training, evaluation, leaves, spec), through_block=training.uses_own_parameters)
        for training, evaluation in zip(steps[True], steps[False], strict=True)
    )
    _check(block, branches, call)
    return Residual(branches, _wrapping(block, call))


# --- the forward of a block as a graph -------------------------------------------------------------------------------


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
        raise _RefusedError(f"its forward cannot be traced: {type(error).__name__}: {error}") from error


def _may_be_entered(module: nn.Module) -> bool:
    """Written by the block's authors, and without parameters of its own: its call, which gathers them, is skipped."""
    return not type(module).__module__.startswith("torch.") and not any(True for _ in module.parameters(recurse=False))


# --- from a graph to a chain of sums ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class _Step:
    """One branch: `code(holder of the block, state, tensors)` is what the block adds to a state."""

    name: str
    code: Callable[[Any, Tensor, Sequence[Tensor]], Tensor]
    uses_own_parameters: bool


def _steps(root: _Root, graph: fx.Graph) -> list[_Step]:
    """The branches of a traced forward, first to last."""
    x, tensors = (node for node in graph.nodes if node.op == "placeholder")
    state = _hidden_state(next(node for node in graph.nodes if node.op == "output").args[0])
    chain: list[tuple[fx.Node, list[fx.Node]]] = []
    while state is not x:
        chain.append(_split(state, x))
        state = chain[-1][0]
    if not chain:
        raise _RefusedError("it returns its input")
    states = {x, *(state for state, _ in chain)}
    return [_extract(root, graph, added, states, tensors) for _, added in reversed(chain)]


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
    raise _RefusedError(f"its result is not its input and something added to it: it comes from {_source(total)}")


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


def _extract(root: _Root, graph: fx.Graph, added: Sequence[fx.Node], states: set[fx.Node], tensors: fx.Node) -> _Step:
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
    return _Step(
        name=" > ".join(modules) or str(total),
        code=type(fx.GraphModule(root, branch)).forward,
        uses_own_parameters=any(node.op == "get_attr" and node.target in own for node in branch.nodes),
    )


# --- what was found, as branches -------------------------------------------------------------------------------------


def _function(training: _Step, evaluation: _Step, leaves: list[Any], spec: Any) -> Callable[..., Tensor]:
    constants = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    is_tensor = [isinstance(leaf, Tensor) for leaf in leaves]

    def function(block: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        given, given_spec = tree_flatten((args, kwargs))
        same = given_spec == spec and [isinstance(leaf, Tensor) for leaf in given] == is_tensor
        if not (
            same and all(tensor or leaf == was for leaf, was, tensor in zip(given, constants, is_tensor, strict=True))
        ):
            raise ValueError(
                f"{type(block).__name__} was taken apart when called with {_described(leaves)} besides x, and is now "
                f"called with {_described(given)}; rewire with an example of this kind, or register residual_branches"
            )
        step = training if block.training else evaluation
        return step.code(SimpleNamespace(block=block), x, given)

    return function


def _described(leaves: Sequence[Any]) -> str:
    return "(" + ", ".join("a tensor" if isinstance(leaf, Tensor) else repr(leaf) for leaf in leaves) + ")"


def _wrapping(block: nn.Module, call: Call) -> Callable[[nn.Module, Tensor], Any]:
    """How the block returns its hidden state: as it is, or first in a tuple whose rest is None."""
    with _undisturbed(block, call, training=False):
        output = block(call.x, *call.args, **call.kwargs)
    if isinstance(output, Tensor):
        return lambda block, x: x
    if any(value is not None for value in output[1:]):
        raise _RefusedError("it returns more than its hidden state")
    rest = output[1:]
    return lambda block, x: (x, *rest)


def _check(block: nn.Module, branches: Sequence[Branch], call: Call) -> None:
    """Both modes, the same draws: x + F(x) + G(x + F(x)) .. must be what the block returns."""
    for training in (True, False):
        results = []
        for run in (_run_block, _run_branches):
            with _undisturbed(block, call, training=training):
                x = call.x.clone()
                results.append(run(block, branches, Call(x, call.args, call.kwargs)))
            if not torch.equal(x, call.x):
                raise _RefusedError("it writes into its input")
        wanted, found = results
        if wanted.shape != found.shape:
            raise _RefusedError(f"it turns {tuple(call.x.shape)} into {tuple(wanted.shape)}")
        error = (found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30)
        if not error <= 64 * torch.finfo(wanted.dtype).eps:
            raise _RefusedError(f"the branches found miss its result by {error:.1e} of the largest element")


def _run_block(block: nn.Module, branches: Sequence[Branch], call: Call) -> Tensor:
    output = block(call.x, *call.args, **call.kwargs)
    return output[0] if isinstance(output, tuple) else output


def _run_branches(block: nn.Module, branches: Sequence[Branch], call: Call) -> Tensor:
    x = call.x
    for branch in branches:
        x = x + branch.function(block, x, *call.args, **call.kwargs)
    return x


@contextmanager
def _undisturbed(block: nn.Module, call: Call, *, training: bool) -> Iterator[None]:
    """Runs in a mode, without gradients, and leaves generators, buffers and modes as they were."""
    generators = GeneratorState.now(call.x.device)
    with torch.no_grad(), generators.replayed(), _mode(block, training=training), held(list(block.buffers())):
        yield


@contextmanager
def _mode(module: nn.Module, *, training: bool) -> Iterator[None]:
    before = [(child, child.training) for child in module.modules()]
    module.train(training)
    try:
        yield
    finally:
        for child, mode in before:
            child.training = mode
