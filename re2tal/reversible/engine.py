"""Runs a sequence of residual branches without saving the states in between; backward rebuilds them one by one.

    x[i+1] = x[i-1] + F_i(x[i]),   x[-1] = x[0] = x,   i = 0 .. n-1        then merge(x[n-1], x[n])

    forward     saves x[n-1] and x[n], nothing else
    backward    for i = n-1 .. 0: runs F_i(x[i]) again, turns x[i+1] into x[i-1] by subtracting it, differentiates it

A coupling other than this sum also has a multiple of x[i] in it. Its inverse amplifies errors, so forward saves more
states and backward inverts only between them; see `coupling`.

One autograd Function spans the whole run; see `function`. A `ChunkedBranch` runs piece by piece in both directions; see
`chunking`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import torch
from torch import Tensor, nn

from re2tal.reversible.coupling import SUM, Coupling, Merge
from re2tal.reversible.function import ReversibleRun
from re2tal.reversible.monitor import Monitor, Observation
from re2tal.reversible.precision import GridStep, StateFormat, States
from re2tal.reversible.recompute import recomputable_from
from re2tal.reversible.replay_context import same_kernels
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
    grid: GridStep = "auto",
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
    precision = StateFormat.of(x, grid, coupling, states=states, kinks=kinks)
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
    output = ReversibleRun.apply(x, anchor, run, owner, _observed(run, x, monitor))
    node: Any = output.grad_fn
    # Taken off the node, which would keep them on the device where hooks (offload) have moved the saved states away.
    ends, node.ends = node.ends, None
    return recomputable_from(output, ends, run.mean) if run.saves_its_ends() else output


def _observed(run: Run, x: Tensor, monitor: Monitor | None) -> Observation | None:
    return monitor.observe(x[1] if run.streams else x, run.precision) if monitor else None


def _is_trained(owner: nn.Module | None) -> bool:
    return owner is None or any(parameter.requires_grad for parameter in owner.parameters())
