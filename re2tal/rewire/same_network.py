"""Shows with an example that a rewired network, at beta = 0, is the network that was rewired.

    plain(example)                                  what is wanted
    rewired(example), every block at once           finds where states are used inside runs: runs end there
    rewired(example), in runs, at beta = 0          must return the same tensors, all of them

In float64 where the model can be cast to it, in evaluation mode and with fixed draws. Of the numbers of the model, its
buffers, its modes and the generators nothing changes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from re2tal.reversible.precision import dense
from re2tal.reversible.replay_context import held
from re2tal.reversible.rng import GeneratorState
from re2tal.rewire.conditions import cast, undisturbed
from re2tal.rewire.discover import Example, call_model, in_mode
from re2tal.rewire.pending import BlockCall, RewireError, values_of
from re2tal.rewire.stage import RewiredStage

FLOAT64_PARAMETERS = 500_000_000
"""Larger models are compared in their own dtype: in float64 they would need gigabytes more."""
FLOAT64_TOLERANCE = 1e-9
"""Of the largest element: both forms compute the same sums. Where a model computes in float32 inside, the effect of one
rounding is measured."""


def check_same_network(model: nn.Module, example: Example) -> None:
    """Lets runs of the rewired `model` end where the example uses states, and compares it with the plain one.

    Raises RewireError where the two differ: it names the first block where they do, and a likely reason. Raises
    ValueError for an example that fails, or whose output is not a number.
    """
    failed, stages = None, stages_of(model)
    own = sum(parameter.numel() for parameter in model.parameters()) > FLOAT64_PARAMETERS
    for dtype in (None,) if own else (torch.float64, None):
        with undisturbed(model, dtype):
            given = cast(example, dtype)
            try:
                with plainly(model), _watched(stages, keep=False) as calls:
                    wanted = _outputs(model, given)
            except ValueError as error:
                failed = failed or error
                continue
            _check_numbers(model, wanted)
            return _check(model, given, wanted, [call.block for call in calls], dtype or _dtype_of(model))
    raise failed or AssertionError


def _check(
    model: nn.Module, example: Example, wanted: list[Output], blocks: list[nn.Module], dtype: torch.dtype
) -> None:
    stages = stages_of(model)
    with _at_beta_0(stages):
        with _learning(stages, Learned()) as learned:
            found = _rewired(model, example)
        if (place := _first_other_call(blocks, learned)) is not None:
            raise RewireError(place)
        if difference := _difference(model, example, wanted, found, dtype):
            raise RewireError(f"{difference}: {_explained(model, example, dtype)}")
        for want, have in zip(wanted, found, strict=True):
            if want.has_gradient and not have.has_gradient:
                raise RewireError(
                    f"{want.path} of this {type(model).__name__} has a gradient, and would have none rewired: it comes "
                    "from inside of a branch, which keeps no graph; do without it, or set recompute=False"
                )
        # Apart, because hooks inside of blocks fire twice.
        with _learning(stages, Learned(twice=True)), torch.no_grad():
            _rewired(model, example)
    for stage in stages:
        stage.ends = frozenset(learned.ends.get(stage, ())) - stage.run_ends()
    with _at_beta_0(stages):
        found = _rewired(model, example)
        if difference := _difference(model, example, wanted, found, dtype):
            raise RewireError(f"{difference}: in runs of several blocks, although each block alone agrees")


class Output(NamedTuple):
    """A leaf of what a model returns."""

    path: str
    leaf: Any
    has_gradient: bool


def _outputs(model: nn.Module, example: Example) -> list[Output]:
    def output(path: str, leaf: Any) -> Output:
        if not isinstance(leaf, Tensor):
            return Output(path, leaf, has_gradient=False)
        leaf = values_of(leaf)
        return Output(path, leaf.detach(), has_gradient=leaf.requires_grad)

    return [output(path, leaf) for path, leaf in _leaves(call_model(model, example), "output")]


@dataclass(slots=True)
class Learned:
    """What an example shows of how blocks are called. Set in the stages of a network, it runs every block at once."""

    ends: dict[RewiredStage, set[str]] = field(default_factory=dict)
    """Blocks whose output is used by something else than the next block."""
    calls: list[Called] = field(default_factory=list)
    keep: bool = False
    """Whether `calls` keeps states."""
    twice: bool = False
    """Whether each block must give the same when it runs again, in training mode, as it does in backward."""

    def run(self, stage: RewiredStage, calls: tuple[BlockCall, ...], x: Tensor) -> Tensor:
        """Computes the one call in `calls`."""
        (call,) = calls
        output = stage.run(calls, x)
        if self.twice and stage.config.recompute:
            _check_again(stage, call, x)
        kept = (x.detach().clone(), output.detach().clone()) if self.keep else (None, None)
        self.calls.append(Called(stage.get_submodule(call.name), stage.name_of(call.name), *kept))
        return output

    def ends_behind(self, stage: RewiredStage, name: str) -> None:
        """Notes that the state behind a block is used."""
        self.ends.setdefault(stage, set()).add(name)


class Called(NamedTuple):
    """One call of a residual block."""

    block: nn.Module
    name: str
    x: Tensor | None
    output: Tensor | None


def stages_of(model: nn.Module) -> list[RewiredStage]:
    """The rewired stages in `model`."""
    return [module for module in model.modules() if isinstance(module, RewiredStage)]


@contextmanager
def plainly(model: nn.Module) -> Iterator[None]:
    """Inside, a rewired model is the plain one."""
    places = [
        (model.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2], stage)
        for path, stage in model.named_modules(remove_duplicate=False)
        if isinstance(stage, RewiredStage)
    ]
    for parent, name, stage in places:
        setattr(parent, name, stage.plain())
    try:
        yield
    finally:
        for parent, name, stage in places:
            stage.guard()
            setattr(parent, name, stage)


def _rewired(model: nn.Module, example: Example) -> list[Output]:
    try:
        return _outputs(model, example)
    except RewireError:
        raise
    except ValueError as error:
        raise RewireError(
            f"this {type(model).__name__} runs on the example, but not rewired, so its blocks are used in a way that a "
            f"rewired stage does not allow: {error.__cause__ or error}"
        ) from error


# ------------------------------------------------------------------------------------------------------- differences


def _difference(
    model: nn.Module, example: Example, wanted: list[Output], found: list[Output], dtype: torch.dtype
) -> str:
    """The first leaf of the output that differs, in words; "" where none does."""
    about = f"rewired at beta 0, this {type(model).__name__} is another network"
    paths = [[one.path for one in outputs] for outputs in (wanted, found)]
    if paths[0] != paths[1]:
        missing = sorted(set(paths[0]) ^ set(paths[1]))
        return f"{about}: only one of the two returns {', '.join(missing[:4])}"
    noise = None
    for number, ((path, want, _), (_, have, _)) in enumerate(zip(wanted, found, strict=True)):
        if not isinstance(want, Tensor) or not isinstance(have, Tensor):
            if type(want) is not type(have) or want != have:
                return f"{about}: {path} is {have!r} in place of {want!r}"
            continue
        if want.shape != have.shape or want.dtype != have.dtype:
            mine, its = ((tuple(one.shape), str(one.dtype)) for one in (have, want))
            return f"{about}: {path} has shape and dtype {mine} in place of {its}"
        tolerance = FLOAT64_TOLERANCE if dtype == torch.float64 else 64 * torch.finfo(dtype).eps
        if (error := _error(want, have)) > tolerance:
            noise = noise or _noise(model, example, dtype, wanted)
            if not error <= min(50 * noise[number], 1e-3):
                return f"{about}: {path} differs by {error:.1e} of its largest element"
    return ""


def _error(want: Tensor, have: Tensor) -> float:
    if not want.numel() or torch.equal(want, have):
        return 0.0
    if not (want.is_floating_point() or want.is_complex()):
        return float("inf")
    infinite = want.isinf()
    if not torch.equal(have[infinite], want[infinite]):
        return float("inf")
    want, have = (one.masked_fill(infinite, 0) for one in (want, have))
    return float((want - have).abs().max() / want.abs().max().clamp_min(1e-30))


def _noise(model: nn.Module, example: Example, dtype: torch.dtype, wanted: list[Output]) -> list[float]:
    """By leaf of the output: by how much one rounding of every parameter changes it."""
    before = [(parameter, parameter.data) for parameter in model.parameters() if parameter.is_floating_point()]
    try:
        for parameter, values in before:
            parameter.data = values * (1 + 2 * torch.finfo(dtype).eps)
        with plainly(model):
            other = _outputs(model, example)
    finally:
        for parameter, values in before:
            parameter.data = values
    return [
        _error(want, have)
        if isinstance(want, Tensor) and isinstance(have, Tensor) and want.shape == have.shape
        else 0.0
        for (_, want, _), (_, have, _) in zip(wanted, other, strict=False)
    ]


def _explained(model: nn.Module, example: Example, dtype: torch.dtype) -> str:
    """The first block where the two forms part, and why that may be."""
    stages = stages_of(model)
    with plainly(model), _watched(stages, keep=True) as plain:
        call_model(model, example)
    with _learning(stages, Learned(keep=True)) as learned:
        call_model(model, example)
    tolerance = FLOAT64_TOLERANCE if dtype == torch.float64 else 64 * torch.finfo(dtype).eps
    for want, have in zip(plain, learned.calls, strict=True):
        assert want.x is not None
        assert have.x is not None
        assert want.output is not None
        assert have.output is not None
        if want.x.shape != have.x.shape or _error(want.x, have.x) > tolerance:
            return f"it starts before block {have.name}, which is given another state by what runs between the blocks"
        if want.output.shape != have.output.shape or _error(want.output, have.output) > tolerance:
            kind = type(have.block).__name__
            return (
                f"it starts in block {have.name}: the branches registered for {kind} do not add up to what the block "
                "returns, or it reads a buffer or another thing that it writes; correct residual_branches"
            )
    return (
        "all blocks give the same, so what differs is what others make of their outputs, or of attributes of the blocks"
    )


def _first_other_call(wanted: list[nn.Module], learned: Learned) -> str | None:
    """Where blocks are called in another order than in the plain network, in words; None where they are not."""
    found = [call.block for call in learned.calls]
    if len(found) == len(wanted) and all(one is other for one, other in zip(found, wanted, strict=True)):
        return None
    same = next(
        (n for n, (a, b) in enumerate(zip(found, wanted, strict=False)) if a is not b), min(len(found), len(wanted))
    )
    place = learned.calls[same - 1].name if same else "the first block"
    return (
        f"the plain network calls {len(wanted)} residual blocks on this example, the rewired one {len(found)} through "
        f"its stages; they part behind {place}: iterate over the container of the blocks or index it, instead of "
        "reaching them through children() or by an attribute"
    )


def _check_again(stage: RewiredStage, call: BlockCall, x: Tensor) -> None:
    """Raises RewireError if the block, in training mode, gives another output when it runs a second time."""
    block, draws, results = stage.get_submodule(call.name), GeneratorState.now(x.device), []
    try:
        for _ in range(2):
            with in_mode(block, training=True), held(block.modules()), draws.replayed():
                results.append(stage.run((call,), x))
    except RewireError:
        raise
    except Exception as error:
        raise RewireError(
            f"block {stage.name_of(call.name)} fails on the example in training mode: {type(error).__name__}: {error}"
        ) from error
    if results[0].shape != results[1].shape or _error(*results) > 64 * torch.finfo(x.dtype).eps:
        raise RewireError(
            f"block {stage.name_of(call.name)} ({type(block).__name__}) gives another output when it runs again with "
            "the same input, draws and buffers: it reads something that it writes (a cache that it is called with, an "
            "attribute), or draws from a generator of its own; backward could not run it again"
        )


# -------------------------------------------------------------------------------------------------------- conditions


@contextmanager
def _at_beta_0(stages: Sequence[RewiredStage]) -> Iterator[None]:
    """Inside, stages are at beta 0."""
    before = [(stage, stage.config) for stage in stages]
    for stage, config in before:
        stage.config = replace(config, beta=0.0)
    try:
        yield
    finally:
        for stage, config in before:
            stage.config = config


@contextmanager
def _learning(stages: Sequence[RewiredStage], learned: Learned) -> Iterator[Learned]:
    for stage in stages:
        stage.learned = learned
    try:
        yield learned
    finally:
        for stage in stages:
            stage.learned = None


@contextmanager
def _watched(stages: Sequence[RewiredStage], *, keep: bool) -> Iterator[list[Called]]:
    """Yields the calls of the blocks that are residual in the rewired model, while the plain one runs."""
    names = {stage.get_submodule(name): stage.name_of(name) for stage in stages for name in stage.residual}
    calls: list[Called] = []

    def note(block: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        calls.append(
            Called(
                block, names[block], *((args[0].detach().clone(), hidden.detach().clone()) if keep else (None, None))
            )
        )

    def lay_out(block: nn.Module, args: tuple) -> tuple:
        """As a run does: sums in float32 inside of a block depend on it."""
        return (dense(args[0]), *args[1:]) if args and isinstance(args[0], Tensor) else args

    with ExitStack() as stack:
        for block in names:
            stack.callback(block.register_forward_pre_hook(lay_out).remove)
            stack.callback(block.register_forward_hook(note, with_kwargs=True).remove)
        yield calls


def _check_numbers(model: nn.Module, wanted: list[Output]) -> None:
    tensors = [(path, leaf) for path, leaf, _ in wanted if isinstance(leaf, Tensor)]
    if not tensors:
        raise ValueError(f"this {type(model).__name__} returns no tensor on the example, so nothing can be compared")
    for path, leaf in tensors:
        if leaf.is_floating_point() and leaf.isnan().any():
            raise ValueError(
                f"before anything is rewired, {path} of this {type(model).__name__} is NaN on the example: look at its "
                "weights and at the example"
            )


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Everything in an output, with where it is: of mappings, sequences, dataclasses and objects that hold tensors."""
    if isinstance(value, Tensor) or value is None or isinstance(value, bool | int | float | complex | str | bytes):
        yield path, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}")
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            yield from _leaves(inner, f"{path}[{number}]")
    elif is_dataclass(value):
        for one in fields(value):
            yield from _leaves(getattr(value, one.name), f"{path}.{one.name}")
    elif hasattr(value, "__dict__") and not isinstance(value, nn.Module | type) and not callable(value):
        yield from _leaves(vars(value), path)


def _dtype_of(model: nn.Module) -> torch.dtype:
    return next((one.dtype for one in model.parameters() if one.is_floating_point()), torch.float32)
