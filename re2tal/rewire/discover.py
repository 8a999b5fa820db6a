"""Takes a block apart that nobody registered: finds x + F(x) in its forward, and checks what it found on the spot.

    hidden = x + attention(norm1(x))         ->   norm1 > attention
    return hidden + mlp(norm2(hidden))       ->   norm2 > mlp

The forward is traced by torch.fx, in training and in evaluation mode, with the modules inside the block left whole, so
that a branch calls them as the block does. Where a sum hides inside one of them (`self.output(hidden, residual)`), that
one is entered too. What was found is run against the block itself before anybody gets it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from re2tal.reversible.buffers import buffers_restored
from re2tal.reversible.rng import GeneratorState
from re2tal.rewire.branches import Branch, NotResidual, Residual, hidden_state
from re2tal.rewire.kinks import KinkFinder
from re2tal.rewire.pending import NESTED, RewireError, split_call
from re2tal.rewire.reads import Reads, TracedError, fingerprint, is_known, recorded_reads
from re2tal.rewire.sums import steps_of
from re2tal.rewire.traced import RefusedError, Step, may_be_entered


@dataclass(frozen=True, slots=True, eq=False)
class BlockInputs:
    """What a block was called with: `block(x, *args, **kwargs)`."""

    x: Tensor
    args: tuple
    kwargs: dict[str, Any]


Example = Sequence[Any] | Mapping[str, Any]
"""Positional arguments of a model, or its arguments by name."""


def call_model(model: nn.Module, example: Example) -> Any:
    """`model` on an example. Raises ValueError where that fails."""
    try:
        return model(**example) if isinstance(example, Mapping) else model(*example)
    except RewireError:
        raise
    except Exception as error:
        kind = f"{type(error).__name__}: {error}"
        raise ValueError(f"the example does not run through this {type(model).__name__}: {kind}") from error


def record_calls(model: nn.Module, blocks: Iterable[nn.Module], *, example: Example) -> dict[nn.Module, BlockInputs]:
    """How each of `blocks` is called on `example`; those that are not called with a tensor first are left out."""
    calls: dict[nn.Module, BlockInputs] = {}

    def record(block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        x, args, kwargs = split_call(block, args, kwargs)
        if isinstance(x, Tensor):
            # A copy, because the model may write into the state later.
            calls.setdefault(block, BlockInputs(x.clone(), args, kwargs))

    handles = [block.register_forward_pre_hook(record, with_kwargs=True) for block in blocks]
    try:
        with in_mode(model, training=False), torch.no_grad():
            call_model(model, example)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def take_apart(block: nn.Module, call: BlockInputs) -> Residual | NotResidual:
    """The branches found in the forward of `block`, or why there are none.

    Branches accept what the block accepts: tensors of any size where `call` has tensors, and the constants of `call`.
    """
    if call.x.is_nested:
        return NotResidual(f"the example calls it with {NESTED}")
    try:
        with _undisturbed(block, call, training=False):
            result = hidden_state(block(call.x.clone(), *call.args, **call.kwargs))
    except Exception as error:  # whatever the block's own code does, called alone
        return NotResidual(f"it does not run alone: {type(error).__name__}: {error}")
    if isinstance(result, Tensor) and result.shape != call.x.shape:
        shapes = f"{tuple(call.x.shape)} into {tuple(result.shape)}"
        return NotResidual(f"it changes width or resolution (downsampling): it turns {shapes}")
    if isinstance(result, Tensor) and not (result.numel() and result.isfinite().all()):
        return NotResidual("the example gives it no numbers, or some that are not finite: look at its weights")
    children = [child for child in block.children() if may_be_entered(child)]
    refusals = []
    # As little as possible is entered, because a module left whole is called, with its hooks. The first refusal is
    # reported: it speaks of the block's own code.
    for entered in ([], *([child] for child in children), children):
        try:
            return _take_apart(block, call, entered)
        except RefusedError as refusal:
            refusals.append(str(refusal))
    return NotResidual(refusals[0])


def as_a_whole(block: nn.Module, call: BlockInputs) -> Residual | NotResidual | None:
    """The block as one branch, F(x) = block(x) - x; None where it changes shapes, or adds nothing to anything.

    NotResidual where it is one, but for what else it returns, and where the example does not show it.
    """
    if call.x.is_nested:
        return NotResidual(f"the example calls it with {NESTED}")
    try:
        with KinkFinder() as kinks, _SumFinder(call.x.shape) as sums:
            for training in (True, False):
                with _undisturbed(block, call, training=training):
                    result = _run_block(block, (), BlockInputs(call.x.clone(), call.args, call.kwargs))
    except Exception:  # as in `take_apart`, which tells
        return None
    # Any block of equal shapes can be written as x + (block(x) - x). Only one that adds somewhere was meant so.
    if not (isinstance(result, Tensor) and result.shape == call.x.shape and sums.found):
        return None
    try:
        return Residual((Branch("block less x", _less_x),), _wrapping(block, call), kinks=kinks.found)
    except RefusedError as refusal:
        return NotResidual(str(refusal))


def _less_x(block: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return hidden_state(block(x, *args, **kwargs)) - x


class _SumFinder(TorchDispatchMode):
    """Inside, `found` becomes True when two tensors with as many elements as `shape` are added."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.size, self.found = shape.numel(), False

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Runs `func`, and looks at what it adds."""
        if func.overloadpacket in (torch.ops.aten.add, torch.ops.aten.add_):
            self.found |= all(isinstance(arg, Tensor) and arg.numel() == self.size for arg in args[:2])
        return func(*args, **(kwargs or {}))


def _take_apart(block: nn.Module, call: BlockInputs, entered: Sequence[nn.Module]) -> Residual:
    leaves, spec = tree_flatten((call.args, call.kwargs))
    if opaque := [leaf for leaf in leaves if not (isinstance(leaf, Tensor) or is_known(leaf))]:
        raise RefusedError(f"it is called with a {type(opaque[0]).__name__}, whose contents may change")
    steps, reads = {}, {}
    for training in (True, False):
        with in_mode(block, training=training), recorded_reads(block, entered) as reads[training]:
            steps[training] = steps_of(block, leaves, spec, entered=entered)
    if [step.name for step in steps[True]] != [step.name for step in steps[False]]:
        raise RefusedError("it adds other branches in training than in evaluation")
    branches = tuple(
        Branch(
            training.name,
            _function(training, evaluation, leaves, spec, reads),
            through_block=training.uses_own_parameters,
        )
        for training, evaluation in zip(steps[True], steps[False], strict=True)
    )
    kinks = _check(block, branches, call)
    return Residual(branches, _wrapping(block, call), kinks=kinks)


def _function(
    training: Step, evaluation: Step, leaves: list[Any], spec: Any, reads: Mapping[bool, Reads]
) -> Callable[..., Tensor]:
    constants = [fingerprint(leaf) for leaf in leaves]

    def function(block: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        given, given_spec = tree_flatten((args, kwargs))
        if given_spec != spec or [fingerprint(leaf) for leaf in given] != constants:
            raise ValueError(
                f"{type(block).__name__} was taken apart when called with {_described(leaves)} besides x, and is now "
                f"called with {_described(given)}; rewire with an example of this kind, or register residual_branches"
            )
        reads[block.training].check(block)
        step = training if block.training else evaluation
        return step.code(SimpleNamespace(block=block), x, given)

    return function


def _described(leaves: Sequence[Any]) -> str:
    return "(" + ", ".join("a tensor" if isinstance(leaf, Tensor) else repr(leaf) for leaf in leaves) + ")"


def _wrapping(block: nn.Module, call: BlockInputs) -> Callable[[nn.Module, Tensor], Any]:
    """How the block returns its hidden state: as it is, or first in a tuple whose rest is None."""
    with _undisturbed(block, call, training=False):
        output = block(call.x, *call.args, **call.kwargs)
    if isinstance(output, Tensor):
        return lambda block, x: x
    if not isinstance(output, tuple):
        raise RefusedError(f"it returns a {type(output).__name__}")
    if any(value is not None for value in output[1:]):
        raise RefusedError("it returns more than its hidden state")
    rest = output[1:]
    return lambda block, x: (x, *rest)


def _check(block: nn.Module, branches: Sequence[Branch], call: BlockInputs) -> bool:
    """Raises RefusedError unless the block returns x + F(x) + G(x + F(x)) .. in both modes, with the same draws.

    Returns whether it has kinks. Noise is added to the example's x: if all its elements were equal, a wrong layout
    would not show.
    """
    noise = torch.randn(call.x.shape, generator=torch.Generator().manual_seed(0)).to(call.x)
    call = BlockInputs(call.x + noise * (0.1 * float(call.x.abs().max()) or 1.0), call.args, call.kwargs)
    finder = KinkFinder()
    for training in (True, False):
        results = []
        for run in (_run_block, _run_branches):
            with _undisturbed(block, call, training=training):
                x = call.x.clone()
                try:
                    with finder:
                        results.append(run(block, branches, BlockInputs(x, call.args, call.kwargs)))
                except TracedError as changed:
                    raise RefusedError(str(changed)) from None
            if not torch.equal(x, call.x):
                raise RefusedError("it writes into its input")
        wanted, found = results
        if wanted.shape != found.shape:
            raise RefusedError(f"the branches found give {tuple(found.shape)} in place of {tuple(wanted.shape)}")
        error = (found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30)
        # Not 0: the block may add its terms in another order. `not <=` refuses NaN too.
        if not error <= 64 * torch.finfo(wanted.dtype).eps:
            raise RefusedError(f"the branches found miss its result by {error:.1e} of the largest element")
        _check_gradients(block, branches, call, training=training)
    return finder.found


def _check_gradients(block: nn.Module, branches: Sequence[Branch], call: BlockInputs, *, training: bool) -> None:
    """Raises RefusedError unless x and the parameters get from the branches the gradients that the block gives them."""
    found = []
    for run in (_run_block, _run_branches):
        with _undisturbed(block, call, training=training), torch.enable_grad():
            found.append(_gradients(run, block, branches, call))
        if found[0] is None:  # the block is not made to be differentiated
            return
    wanted, have = found
    assert wanted is not None
    limit = min(0.25, 2**13 * torch.finfo(call.x.dtype).eps)
    floor = 1e-3 * max(float(one.abs().max()) for one in wanted if one.numel())
    if have is None or not all(
        float((want - one).abs().max()) <= limit * max(floor, float(want.abs().max()))
        for want, one in zip(wanted, have, strict=True)
        if want.numel()
    ):
        raise RefusedError("the branches found have other gradients than the block")


def _gradients(run: Any, block: nn.Module, branches: Sequence[Branch], call: BlockInputs) -> list[Tensor] | None:
    """Of x and of the parameters; None where there are none."""
    x = call.x.detach().clone().requires_grad_()
    leaves = [x, *(parameter for parameter in block.parameters() if parameter.requires_grad)]
    try:
        output = run(block, branches, BlockInputs(x.clone(), call.args, call.kwargs))
        weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output)
        found = torch.autograd.grad(output, leaves, weights, allow_unused=True)
    except RuntimeError:
        return None
    return [torch.zeros_like(leaf) if one is None else one for leaf, one in zip(leaves, found, strict=True)]


def _run_block(block: nn.Module, branches: Sequence[Branch], call: BlockInputs) -> Tensor:
    return hidden_state(block(call.x, *call.args, **call.kwargs))


def _run_branches(block: nn.Module, branches: Sequence[Branch], call: BlockInputs) -> Tensor:
    x = call.x
    for branch in branches:
        x = x + branch.function(block, x, *call.args, **call.kwargs)
    return x


@contextmanager
def _undisturbed(block: nn.Module, call: BlockInputs, *, training: bool) -> Iterator[None]:
    """Runs in a mode, without gradients, and leaves generators, buffers and modes as they were."""
    generators = GeneratorState.now(call.x.device)
    with torch.no_grad(), generators.replayed(), in_mode(block, training=training), buffers_restored(block.modules()):
        yield


@contextmanager
def in_mode(module: nn.Module, *, training: bool) -> Iterator[None]:
    """Inside, `module` and all modules in it are in training mode, or in evaluation mode."""
    before = [(child, child.training) for child in module.modules()]
    module.train(training)
    try:
        yield
    finally:
        for child, mode in before:
            child.training = mode
