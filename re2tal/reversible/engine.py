"""Runs a sequence of residual branches without saving the states in between; backward rebuilds them one by one.

    x[i+1] = x[i-1] + F_i(x[i]),   x[-1] = x[0] = x,   i = 0 .. n-1        then merge(x[n-1], x[n])

    forward     saves x[n-1] and x[n], nothing else
    backward    for i = n-1 .. 0: runs F_i(x[i]) again, turns x[i+1] into x[i-1] by subtracting it, differentiates it

A coupling other than this sum also has a multiple of x[i] in it. Its inverse amplifies errors, so forward saves more
states and backward inverts only between them; see `coupling`.

One autograd Function spans the whole run. Inside its backward every branch gets a real, nested `backward()` that
accumulates into the leaves, so that the hooks which DDP and DeepSpeed put on modules and parameters see an ordinary
backward. Parameters are no inputs of the Function, because ZeRO-3 keeps them partitioned, hence empty, outside their
modules. A `ChunkedBranch` runs piece by piece in both directions; see `chunking`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import torch
from torch import Tensor, nn

from re2tal.reversible.coupling import SUM, Coupling, Merge
from re2tal.reversible.differentiation import differentiate, differentiate_pieces, watched
from re2tal.reversible.monitor import Monitor, Observation
from re2tal.reversible.precision import Grid, Precision, States
from re2tal.reversible.recompute import recomputable_from
from re2tal.reversible.record import Graph, Recording
from re2tal.reversible.replay_context import BufferWatch, held, same_kernels
from re2tal.reversible.rng import GeneratorState
from re2tal.reversible.run import BranchFunction, Run


@torch._disable_dynamo  # what is replayed must be what ran, and graphs know nothing of it
def run_reversibly(
    branches: Sequence[BranchFunction],
    x: Tensor,
    *,
    recompute: bool = True,
    saved_branches: int = 0,
    saved_outputs: int = 0,
    saved_attention: int = 0,
    merge: Merge = "mean",
    streams: bool = False,
    coupling: Coupling = SUM,
    states: States = "float32",
    grid: Grid = "auto",
    kinks: bool = False,
    owner: nn.Module | None = None,
    monitor: Monitor | None = None,
) -> Tensor:
    """Runs residual branches so that activations need not be saved; the output does not depend on `recompute`.

    Args:
        branches: F_0 .. F_{n-1}, each from a floating tensor to one of the same shape. A branch must not hold on to its
            input: the buffer is used again once it returns. With no branches, `x` itself is returned. A
            `ChunkedBranch` runs in pieces.
        x: the first state, any shape. It is never written.
        recompute: rebuild activations in backward; otherwise save them, as plain autograd does.
        saved_branches: how many branches, counted from the end, save their activations in spite of `recompute`.
        saved_outputs: how many of the other branches save their output, so that backward can skip the linear layer that
            they end in (`WholeBranch.last`). Chosen are those with the largest such layer; of equal ones, the later.
        saved_attention: how many of the rebuilt branches, from the first that has one, save what their attention
            kernels return, so that backward need not run them again; see `saved_attention`.
        merge: "mean" is (x[n-1] + x[n]) / 2, the paper's; "extrapolate" is x[n-1] + x[n] - x; see `coupling`.
        streams: for networks that were born reversible: `x` is x[-1] and x[0], stacked along a first axis, and so are
            x[n-1] and x[n], which are returned without a merge.
        coupling: how states follow from the two before them; by default x[i+1] = x[i-1] + F_i(x[i]), as above.
        states: the numbers that states are made of; see `precision`.
        grid: rounds states so that they are rebuilt to the last bit; see `precision`.
        kinks: whether the slope of a branch jumps somewhere, as ReLU's does: "auto" is then a grid in float32 too.
        owner: the module that holds every parameter and buffer that the branches use. If neither its parameters nor `x`
            want a gradient, nothing is saved. Without one, a gradient is wanted and no buffer is written.
        monitor: compares the rebuilt first state with the original, in the steps that it chooses.

    Returns:
        The merged state, in the dtype of `x`; in float32 under autocast. Where the run saves the two states that it is
        merged from, it has a `Recipe` that uses them.

    Raises:
        ValueError: a branch changes shape or dtype, an option is none of the above, or "int32" states are to be trained
            while every branch keeps its activations.
        RuntimeError: in backward, when called twice or with `create_graph=True`: the activations are gone by then.

    Tensors that branches reach other than through their input must be leaves: parameters, or constants that want no
    gradient. A parameter used by two branches gets its gradient in two parts, which DDP, ZeRO-2 and ZeRO-3 refuse.

    Supported: `backward()`, several losses in one, accumulation over steps, hooks on modules inside branches and on
    parameters, checkpoints around the run, autocast, copies and pickles, ZeRO-1 to ZeRO-3, DDP, FSDP2 of a module that
    holds the run, `torch.compile` of code around it (the run stays out of graphs) and of modules inside.

    An error: second derivatives, a second backward, `autograd.grad` and `backward(inputs=..)` while parameters are
    trained, parameters exchanged before backward (`functional_call`). Not noticed: `backward(inputs=..)` of parameters
    of the run alone, which reaches no node of it and gives nothing. A branch runs twice a step, so what it counts
    outside of buffers counts twice.
    """
    _check(x, merge, saved_branches=saved_branches, saved_outputs=saved_outputs, saved_attention=saved_attention)
    if not branches:
        return x
    rebuilt = max(0, len(branches) - saved_branches) if recompute else 0
    precision = Precision.of(x, grid, coupling, states=states, kinks=kinks)
    if streams and not (coupling.is_sum and len(x) == 2):
        raise ValueError(f"two streams are coupled by sums, and stacked: x has shape {tuple(x.shape)}, {coupling}")
    run = Run(tuple(branches), rebuilt, saved_outputs, saved_attention, merge, coupling, precision, streams)
    is_trained = torch.is_grad_enabled() and (x.requires_grad or _is_trained(owner))
    if is_trained and not rebuilt and not precision.states.is_floating_point:
        raise ValueError("autograd keeps no gradient of int32 states; set recompute, or states to 'float32'")
    if not (rebuilt and is_trained):
        with same_kernels():
            return run.merged(*run.states(x, run.output)[:3])
    return _recomputed(run, x, owner, monitor)


def _check(x: Tensor, merge: str, **numbers: int) -> None:
    if merge not in get_args(Merge):
        raise ValueError(f"unknown merge {merge!r}; known: {list(get_args(Merge))}")
    if not x.is_floating_point():
        raise ValueError(f"a reversible run needs floating point states, got {x.dtype}; convert x first")
    for name, number in numbers.items():
        if number < 0:
            raise ValueError(f"{name} is {number}; give a number of branches, 0 for none")


def _recomputed(run: Run, x: Tensor, owner: nn.Module | None, monitor: Monitor | None) -> Tensor:
    """Returns the output of a run whose backward rebuilds the states."""
    # Parameters are no inputs of the Function, and x may want no gradient. If no input wanted one, autograd would not
    # record the Function, and the parameters would silently get no gradients. The anchor is an input that wants one.
    anchor = torch.empty(0, device=x.device, requires_grad=True)
    output = _Reversible.apply(x, anchor, run, owner, _observed(run, x, monitor))
    node: Any = output.grad_fn
    # Taken off the node, which would keep them on the device where hooks (offload) have moved the saved states away.
    ends, node.ends = node.ends, None
    return recomputable_from(output, ends, run.mean) if run.saves_its_ends() else output


def _observed(run: Run, x: Tensor, monitor: Monitor | None) -> Observation | None:
    return monitor.observe(x[1] if run.streams else x, run.precision) if monitor else None


def _is_trained(owner: nn.Module | None) -> bool:
    return owner is None or any(parameter.requires_grad for parameter in owner.parameters())


def _exchanged(before: list[Tensor], now: list[Tensor]) -> bool:
    """Whether a parameter is another tensor. FSDP exchanges sharded ones, of a type of their own, for whole ones."""
    plain = (Tensor, nn.Parameter)
    pairs = ((one, other) for one, other in zip(before, now, strict=False) if one is not other)
    return any(type(one) in plain and type(other) in plain for one, other in pairs)


_DDP_REMEDY = (
    "DistributedDataParallel took a parameter of a reversible run for ready before its gradient was: it sees no way "
    "from the output to parameters inside a run, nor that two branches share one; give it static_graph=True, or, where "
    "no branches share parameters, leave find_unused_parameters out"
)


class _Reversible(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, anchor: Tensor, run: Run, owner: nn.Module | None, observation: Observation | None
    ) -> Tensor:
        del anchor
        ctx.owner, ctx.parameters = owner, None if owner is None else list(owner.parameters())
        before = GeneratorState.now(x.device)
        watch = BufferWatch(owner)
        found = _run_forward(ctx, x, run, watch, observation)
        if watch.is_first and (writers := watch.found_writers()):
            # Branches that read what they write must be replayed from what they read, which was not saved, as nobody
            # knew. Known now, it is saved in a second forward, and in all that follow.
            for saved in [*writers, *watch.statistics()]:
                saved.put_back()
            before.restore()
            found = _run_forward(ctx, x, run, BufferWatch(owner), observation)
        start, previous, current, states = found
        # Saved, not kept as attributes: autograd then notices writes to x, and hooks on saved tensors see the states.
        ctx.save_for_backward(*states)
        ctx.ends = previous, current
        return run.merged(start, previous, current)

    # From torch 2.12 on, gradients then come in a list that backward can empty. Autograd would otherwise hold the
    # output's gradient, as large as a state, until backward returns.
    boxed_grads_call = True

    @staticmethod
    @torch._disable_dynamo
    def backward(ctx: Any, gradients: list[Tensor] | Tensor) -> tuple[Tensor | None, None, None, None, None]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "a reversible run forgets its activations, so it has no second derivatives: backward was called with "
                "create_graph=True; call it without, or run with recompute=False"
            )
        if ctx.spent:
            raise RuntimeError(
                "backward went through a reversible run twice, but the first time consumed its states; add the losses "
                "and call backward once, or run with recompute=False"
            )
        ctx.spent = True
        is_trained = ctx.parameters is None or any(one.requires_grad for one in ctx.parameters)
        if is_trained and not torch._C._will_engine_execute_node(ctx.next_functions[1][0]):
            raise RuntimeError(
                "gradients of chosen tensors were asked for (autograd.grad, or backward(inputs=..)), but a reversible "
                "run gives those of its parameters to their .grad only; call backward() for all, freeze the "
                "parameters, or run with recompute=False"
            )
        if ctx.parameters is not None and _exchanged(ctx.parameters, list(ctx.owner.parameters())):
            raise RuntimeError(
                "a module of a reversible run has other parameters in backward than in forward (functional_call?), "
                "and its branches would run again with these; call backward where they are in place, or run with "
                "recompute=False"
            )
        gradients = gradients if isinstance(gradients, list) else [gradients]
        try:
            with held(ctx.written), same_kernels():
                return _backward(ctx, gradients), None, None, None, None
        except RuntimeError as error:
            if "mark a variable ready only once" in str(error):
                raise RuntimeError(_DDP_REMEDY) from error
            raise


def _run_forward(
    ctx: Any, x: Tensor, run: Run, watch: BufferWatch, observation: Observation | None
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Runs all branches and records what backward needs to run them again. Returns x, x[n-1], x[n] and saved states."""
    recording = Recording.begin(run, x.device)
    ctx.recording, ctx.observation, ctx.spent = recording, observation, False

    def update(index: int, function: BranchFunction, state: Tensor) -> Tensor:
        record = recording.branches[index]
        if record.saves == "graph":
            point, output = watched(recording, index, run.output, function, state, None)
            record.graphs.append(Graph.of(point, output))
            return output.detach()
        before, buffers = GeneratorState.now(state.device), watch.save()
        with recording.saving_attention(record):
            output = run.output(index, function, state)
        # Most branches draw nothing: their generator states, some kilobytes each, need not be kept.
        record.draws.append(None if before.same_as(GeneratorState.now(state.device)) else before)
        record.buffers.append(watch.written_of(buffers))
        if record.saves == "output":
            # Before rounding, which widens it: under autocast it takes half the memory.
            record.outputs.append(output)
        return output

    # Detached, because inside a Function x still has requires_grad set, and hooks of modules act on that.
    with same_kernels():
        found = run.states(x.detach(), update, saved=run.saved_states(), observation=observation)
    ctx.written = watch.written()
    return found


def _backward(ctx: Any, gradients: list[Tensor]) -> Tensor | None:
    """Walks the states backwards and returns the gradient of x; parameters accumulate theirs on the way.

    `gradients` holds the gradient of the run's output. It is removed from the list, so that it can be freed early.

    In round i, `previous` is x[i], `current` is x[i+1], `to_previous` is dx[i+2] and `to_current` is dx[i+1]. Gradients
    follow the same recurrence as states, so each step updates the older of two buffers in place.
    """
    recording: Recording = ctx.recording
    recording.x_wants_gradient = ctx.needs_input_grad[0]
    run = recording.run
    length, coupling = len(run.branches), run.coupling
    saved = dict(zip(run.saved_states(), ctx.saved_tensors, strict=True))
    previous, current = saved.pop(run.rebuilt - 1), saved.pop(run.rebuilt, None)
    to_output = gradients.pop().to(run.precision.gradients)
    if run.streams:
        to_previous, to_current = (gradient.clone() for gradient in to_output)  # they are written
    else:  # dx[n+1] = dx[n], as x[-1] = x[0] in forward
        to_previous = to_current = coupling.gradient_of_end(to_output, merge=run.merge)
    # Only "extrapolate" needs the output's gradient again, at the start; there it is dx[n] itself. A mean frees it now.
    gradient = to_output if to_current is to_output else None
    del to_output
    for index in reversed(range(1, length)):
        # A gradient may be overwritten only if it has no other name, and is not the caller's.
        owned = not (to_previous is to_current or to_previous is gradient)
        # x[i-1] is either among the saved states or rebuilt in the buffer of x[i+1]. Branches that saved their graph
        # need neither.
        before = saved.pop(index - 1, None) if index < run.rebuilt else None
        following = current if before is None and index < run.rebuilt else None
        pieces = run.pieces(index, previous)
        if pieces:
            # Pieces add what they give to dx[i] straight into the buffer, so the rest of the sum must be there first.
            to_previous = coupling.carried(to_previous, to_current, owned=owned)
            differentiate_pieces(recording, index, pieces, previous, following, to_current, to_previous)
            to_previous, to_current = to_current, to_previous
        else:
            to_input = differentiate(recording, index, previous, following, to_current)
            advanced = coupling.advance(to_previous, to_current, to_input, owned=owned)
            to_previous, to_current = to_current, advanced
            # Both are in `to_current` now; the names would keep a gradient alive through the next round.
            del to_input, advanced
        # Behind the rebuilt branches nothing is rebuilt, so the pair stays where the last of them will need it.
        if index < run.rebuilt:
            previous, current = current if before is None else before, previous
    if ctx.observation is not None:
        ctx.observation.rebuilt(previous)
    pieces = run.pieces(0, previous)
    if run.streams:
        if pieces:
            differentiate_pieces(recording, 0, pieces, previous, None, to_current, to_previous)
        elif (to_input := differentiate(recording, 0, previous, None, to_current)) is not None:
            to_previous = to_previous.add_(to_input)
        return torch.stack((to_current, to_previous)) if recording.x_wants_gradient else None
    if pieces:
        to_x = coupling.gradient_of_start(to_previous, to_current, gradient, merge=run.merge)
        del to_previous
        differentiate_pieces(recording, 0, pieces, previous, None, to_current, to_x)
        return to_x if recording.x_wants_gradient else None
    to_input = differentiate(recording, 0, previous, None, to_current)
    if not recording.x_wants_gradient:
        return None
    return coupling.gradient_of_start(to_previous, to_current, gradient, merge=run.merge).add_(to_input)
