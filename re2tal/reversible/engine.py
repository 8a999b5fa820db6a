"""Runs a sequence of residual branches and forgets what is in between; backward rebuilds it, state by state.

    x[i+1] = x[i-1] + F_i(x[i]),   x[-1] = x[0] = x,   i = 0 .. n-1        then merge(x[n-1], x[n])

    forward     keeps x[n-1] and x[n], nothing else
    backward    for i = n-1 .. 0: runs F_i(x[i]) again, takes it from x[i+1] in place to get x[i-1], differentiates it

A coupling other than this sum has x[i] in it too, and cannot be inverted as well: more states are then kept, as many as
it takes, and backward inverts between them; see `coupling`.

One autograd Function spans the whole run. Inside its backward every branch gets a real, nested `backward()` that
accumulates into the leaves, so that the hooks which DDP and DeepSpeed put on modules and parameters see an ordinary
backward. Parameters are no inputs of the Function: ZeRO-3 keeps them partitioned, hence empty, outside their modules.
A `ChunkedBranch` is run piece by piece in all of this; see `chunking`.
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


def run_reversibly(
    branches: Sequence[BranchFunction],
    x: Tensor,
    *,
    recompute: bool = True,
    stored: int = 0,
    known: int = 0,
    merge: Merge = "mean",
    coupling: Coupling = SUM,
    states: States = "float32",
    grid: Grid = "auto",
    kinks: bool = False,
    owner: nn.Module | None = None,
    monitor: Monitor | None = None,
) -> Tensor:
    """Residual branches, coupled so that activations can be forgotten; values do not depend on `recompute`.

    Args:
        branches: F_0 .. F_{n-1}, each from a floating tensor to one of the same shape. Their input is lent: its buffer
            is used again as soon as they return. With none, `x` itself is returned. A `ChunkedBranch` is run in pieces.
        x: the first state, any shape. It is never written.
        recompute: forget activations and rebuild them in backward; otherwise keep them, as plain autograd does.
        stored: how many branches, counted from the end, keep their activations all the same.
        known: how many of the others keep what they added, so that the linear layer that they end in need not be
            computed again: the most expensive of those that have one, `WholeBranch.last`, later ones first.
        merge: "mean" is (x[n-1] + x[n]) / 2, the paper's; "extrapolate" is x[n-1] + x[n] - x, which is the plain
            residual network to first order, and exactly that network for n = 1, and for two whole blocks
            F(x) = block(x) - x.
        coupling: how states follow from the two before them; by default x[i+1] = x[i-1] + F_i(x[i]), as above. Others
            have merges of their own, and keep more states than two where inverting would lose too much; see `coupling`.
        states: the numbers that states are made of; see `precision`.
        grid: rounds states so that they are rebuilt to the last bit; see `precision`.
        kinks: whether the slope of a branch jumps somewhere, as ReLU's does: "auto" is then a grid in float32 too.
        owner: the module that holds every parameter and buffer that the branches use. Buffers that it writes in forward
            are held still in the rebuild, and where none of its parameters, nor `x`, wants a gradient, nothing is kept.
            Without it, a gradient is taken to be wanted and no buffer to be written.
        monitor: compares what is rebuilt with what was forgotten, in the steps that it chooses.

    Returns:
        The merged state, in the dtype of `x`; in float32 under autocast. Where the run keeps the two states that it was
        made of, they are its `Recipe`.

    Raises:
        ValueError: a branch changes shape or dtype, an option is none of the above, or "int32" states are to be trained
            while every branch keeps its activations.
        RuntimeError: in backward, when called twice or with `create_graph=True`: the activations are gone by then.

    Tensors that branches reach other than through their input must be leaves: parameters, or constants that want no
    gradient. A parameter used by two branches gets its gradient in two parts, which ZeRO-2 and ZeRO-3 refuse.
    """
    if merge not in get_args(Merge):
        raise ValueError(f"unknown merge {merge!r}; known: {list(get_args(Merge))}")
    if not x.is_floating_point():
        raise ValueError(f"a reversible run needs floating point states, got {x.dtype}; convert x first")
    if not branches:
        return x
    if stored < 0:
        raise ValueError(f"stored is {stored}; give the number of branches that keep their activations")
    if known < 0:
        raise ValueError(f"known is {known}; give the number of branches that keep what they added")
    rebuilt = len(branches) - stored if recompute else 0
    precision = Precision.of(x, grid, coupling, states=states, kinks=kinks)
    run = Run(tuple(branches), max(0, rebuilt), known, merge, coupling, precision)
    is_trained = torch.is_grad_enabled() and (x.requires_grad or _is_trained(owner))
    if is_trained and not run.rebuilt and not precision.states.is_floating_point:
        raise ValueError("autograd keeps no gradient of int32 states; set recompute, or states to 'float32'")
    if not (run.rebuilt and is_trained):
        with same_kernels():
            return run.merged(*run.states(x, run.update)[:3])
    # Parameters are no inputs of the Function, and x may want no gradient: without an input that does, autograd would
    # leave the Function out, and the parameters would silently get nothing.
    anchor = torch.empty(0, device=x.device, requires_grad=True)
    output = _Reversible.apply(x, anchor, run, owner, monitor.observe(x, precision) if monitor else None)
    node: Any = output.grad_fn
    ends, node.ends = node.ends, None
    return recomputable_from(output, ends, run.mean) if run.keeps_its_ends() else output


def _is_trained(owner: nn.Module | None) -> bool:
    return owner is None or any(parameter.requires_grad for parameter in owner.parameters())


class _Reversible(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, anchor: Tensor, run: Run, owner: nn.Module | None, observation: Observation | None
    ) -> Tensor:
        del anchor
        recording = Recording.begin(run, x.device)
        ctx.recording, ctx.observation, ctx.spent = recording, observation, False

        def update(index: int, function: BranchFunction, state: Tensor) -> Tensor:
            record = recording.branches[index]
            if record.keeps == "graph":
                point, output = watched(recording, index, run.update, function, state, None)
                record.graphs.append(Graph.of(point, output))
                return output.detach()
            before = GeneratorState.now(state.device)
            output = run.output(index, function, state)
            # Most branches draw nothing: their generator states, some kilobytes each, need not be kept.
            record.draws.append(None if before.same_as(GeneratorState.now(state.device)) else before)
            if record.keeps == "output":
                # Before rounding, which widens it: under autocast it takes half the memory.
                record.outputs.append(output)
            return run.precision.round(output)

        buffers = BufferWatch(owner)
        # Here x still says that it wants a gradient, which hooks of modules would believe.
        with same_kernels():
            start, previous, current, kept = run.states(x.detach(), update, kept=run.kept(), observation=observation)
        ctx.buffers = buffers.written()
        # Saved, not kept as attributes: an edit of x is noticed, and hooks on saved tensors see them.
        ctx.save_for_backward(*kept)
        ctx.ends = previous, current
        return run.merged(start, previous, current)

    boxed_grads_call = True  # known since torch 2.12, and lets go of the gradient before backward ends

    @staticmethod
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
        with held(ctx.buffers), same_kernels():
            return _backward(ctx, gradients if isinstance(gradients, list) else [gradients]), None, None, None, None


def _backward(ctx: Any, gradients: list[Tensor]) -> Tensor | None:
    """Walks the states backwards: the parameters get their gradients on the way, x gets the one returned.

    `gradients` has that of what the run returned, and has it no more at the end.
    """
    recording: Recording = ctx.recording
    recording.x_wants_gradient = ctx.needs_input_grad[0]
    run = recording.run
    length, coupling = len(run.branches), run.coupling
    kept = dict(zip(run.kept(), ctx.saved_tensors, strict=True))
    previous, current = kept.pop(run.rebuilt - 1), kept.pop(run.rebuilt, None)
    to_output = gradients.pop().to(run.precision.gradients)
    to_previous = to_current = coupling.gradient_of_end(to_output, merge=run.merge)
    gradient = to_output if to_current is to_output else None  # a mean's is not needed any more
    del to_output
    for index in reversed(range(1, length)):
        owned = not (to_previous is to_current or to_previous is gradient)
        before = kept.pop(index - 1, None) if index < run.rebuilt else None
        following = current if before is None and index < run.rebuilt else None
        pieces = run.pieces(index, previous)
        if pieces:
            to_previous = coupling.carried(to_previous, to_current, owned=owned)
            differentiate_pieces(recording, index, pieces, previous, following, to_current, to_previous)
            to_previous, to_current = to_current, to_previous
        else:
            to_input = differentiate(recording, index, previous, following, to_current)
            advanced = coupling.advance(to_previous, to_current, to_input, owned=owned)
            to_previous, to_current = to_current, advanced
            del to_input, advanced
        if index < run.rebuilt:
            previous, current = current if before is None else before, previous
    if ctx.observation is not None:
        ctx.observation.rebuilt(previous)
    pieces = run.pieces(0, previous)
    if pieces:
        to_x = coupling.gradient_of_start(to_previous, to_current, gradient, merge=run.merge)
        del to_previous
        differentiate_pieces(recording, 0, pieces, previous, None, to_current, to_x)
        return to_x if recording.x_wants_gradient else None
    to_input = differentiate(recording, 0, previous, None, to_current)
    if not recording.x_wants_gradient:
        return None
    return coupling.gradient_of_start(to_previous, to_current, gradient, merge=run.merge).add_(to_input)
