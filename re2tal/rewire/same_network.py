"""Shows with an example that a rewired network, at beta = 0, is the network that was rewired.

    plain(example)                                  what is wanted
    rewired(example), every block at once           finds where states are used inside runs: runs end there
    rewired(example), in runs, at beta = 0          must return the same tensors, all of them

All three run in float64 where the model can be cast to it, in evaluation mode, with the same random draws. Parameters,
buffers, modes and generators are left as they were.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from re2tal.rewire.conditions import cast, undisturbed
from re2tal.rewire.discover import Example
from re2tal.rewire.outputs import Output, check_numbers, outputs_of, relative_error
from re2tal.rewire.pending import RewireError
from re2tal.rewire.recorded_calls import CallRecorder, plain_calls, recording
from re2tal.rewire.stage import RewiredStage, stages_of

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
    failed, stages = None, list(stages_of(model).values())
    own = sum(parameter.numel() for parameter in model.parameters()) > FLOAT64_PARAMETERS
    # Some models cast inside, and fail in float64: then their own dtype has to do.
    for dtype in (None,) if own else (torch.float64, None):
        with undisturbed(model, dtype):
            given = cast(example, dtype)
            try:
                with plainly(model), plain_calls(stages, save_states=False) as calls:
                    wanted = outputs_of(model, given)
            except ValueError as error:
                failed = failed or error
                continue
            check_numbers(model, wanted)
            return _check(model, given, wanted, [call.block for call in calls], dtype or _dtype_of(model))
    raise failed or AssertionError


def _check(
    model: nn.Module, example: Example, wanted: list[Output], blocks: list[nn.Module], dtype: torch.dtype
) -> None:
    stages = list(stages_of(model).values())
    with _at_beta_0(stages):
        with recording(stages, CallRecorder()) as recorder:
            found = _rewired(model, example)
        if (place := _first_other_call(blocks, recorder)) is not None:
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
        with recording(stages, CallRecorder(check_replay=True)), torch.no_grad():
            _rewired(model, example)
    for stage in stages:
        stage.ends = frozenset(recorder.ends.get(stage, ())) - stage.run_ends()
    # In training, blocks leave nothing behind. What they cache for evaluation is looked for in the first forward.
    with _at_beta_0(stages), torch.no_grad():
        found = _rewired(model, example)
        if difference := _difference(model, example, wanted, found, dtype):
            raise RewireError(f"{difference}: in runs of several blocks, although each block alone agrees")


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
        return outputs_of(model, example)
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
        if (error := relative_error(want, have)) > _tolerance(dtype):
            noise = noise or _noise(model, example, dtype, wanted)
            # Excused only where a rounding of the weights changes as much, to a factor of 50, and where the difference
            # is small, or within the rounding of the largest state.
            if not (error <= 50 * noise[number] and (error <= 1e-3 or _is_rounding(model, example, want, have))):
                return f"{about}: {path} differs by {error:.1e} of its largest element"
    return ""


def _tolerance(dtype: torch.dtype) -> float:
    return FLOAT64_TOLERANCE if dtype == torch.float64 else 64 * torch.finfo(dtype).eps


def _is_rounding(model: nn.Module, example: Example, want: Tensor, have: Tensor) -> bool:
    """Whether a difference is within the rounding of the largest state.

    An output that is a difference of such numbers, as a mean behind a norm is, may have no correct digit at all.
    """
    stages = list(stages_of(model).values())
    with plainly(model), plain_calls(stages, save_states=True) as calls:
        outputs_of(model, example)
    largest = max(float(state.abs().max()) for call in calls for state in call.states)
    return float((want - have).abs().max()) <= 64 * torch.finfo(want.dtype).eps * largest


def _noise(model: nn.Module, example: Example, dtype: torch.dtype, wanted: list[Output]) -> list[float]:
    """For each leaf of the output: how much it changes if every parameter changes by one rounding, up or down."""
    found = [_noise_of(model, example, wanted, factor=1 + sign * torch.finfo(dtype).eps) for sign in (2, -2)]
    return [max(pair) for pair in zip(*found, strict=True)]


def _noise_of(model: nn.Module, example: Example, wanted: list[Output], *, factor: float) -> list[float]:
    before = [(parameter, parameter.data) for parameter in model.parameters() if parameter.is_floating_point()]
    try:
        for parameter, values in before:
            parameter.data = values * factor
        with plainly(model):
            other = outputs_of(model, example)
    finally:
        for parameter, values in before:
            parameter.data = values
    return [
        relative_error(want, have)
        if isinstance(want, Tensor) and isinstance(have, Tensor) and want.shape == have.shape
        else 0.0
        for (_, want, _), (_, have, _) in zip(wanted, other, strict=False)
    ]


def _explained(model: nn.Module, example: Example, dtype: torch.dtype) -> str:
    """The first block where the two forms part, and why that may be."""
    stages = list(stages_of(model).values())
    with plainly(model), plain_calls(stages, save_states=True) as plain:
        outputs_of(model, example)
    with recording(stages, CallRecorder(save_states=True)) as recorder:
        outputs_of(model, example)
    tolerance = _tolerance(dtype)
    for want, have in zip(plain, recorder.calls, strict=True):
        given, returned = (
            one.shape != other.shape or relative_error(one, other) > tolerance
            for one, other in zip(want.states, have.states, strict=True)
        )
        if given:
            return f"it starts before block {have.name}, which is given another state by what runs between the blocks"
        if returned:
            kind = type(have.block).__name__
            return (
                f"it starts in block {have.name}: the branches registered for {kind} do not add up to what the block "
                "returns, or it reads a buffer or another thing that it writes; correct residual_branches"
            )
    return (
        "all blocks give the same, so what differs is what others make of their outputs, or of attributes of the blocks"
    )


def _first_other_call(wanted: list[nn.Module], recorder: CallRecorder) -> str | None:
    """Where blocks are called in another order than in the plain network, in words; None where they are not."""
    found = [call.block for call in recorder.calls]
    if len(found) == len(wanted) and all(one is other for one, other in zip(found, wanted, strict=True)):
        return None
    same = next(
        (n for n, (a, b) in enumerate(zip(found, wanted, strict=False)) if a is not b), min(len(found), len(wanted))
    )
    place = recorder.calls[same - 1].name if same else "the first block"
    return (
        f"the plain network calls {len(wanted)} residual blocks on this example, the rewired one {len(found)} through "
        f"its stages; they part behind {place}: iterate over the container of the blocks or index it, instead of "
        "reaching them through children() or by an attribute"
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


def _dtype_of(model: nn.Module) -> torch.dtype:
    return next((one.dtype for one in model.parameters() if one.is_floating_point()), torch.float32)
