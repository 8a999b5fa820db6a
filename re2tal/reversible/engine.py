"""Runs a sequence of residual branches without saving the states in between; backward rebuilds them one by one.

    x[i+1] = x[i-1] + F_i(x[i]),   x[-1] = x[0] = x,   i = 0 .. n-1        then merge(x[n-1], x[n])

    forward     saves x[n-1] and x[n], nothing else
    backward    for i = n-1 .. 0: runs F_i(x[i]) again, turns x[i+1] into x[i-1] by subtracting it, differentiates it

A coupling other than this sum also has a multiple of x[i] in it. Its inverse amplifies errors, so forward saves more
states and backward inverts only between them; see `coupling`.

One autograd Function spans the whole run; see `function`. A `ChunkedBranch` runs piece by piece in both directions; see
`chunking`.

Tensors that branches reach other than through their input must be leaves: parameters, or constants that want no
gradient. A parameter used by two branches gets its gradient in two parts, which DDP, ZeRO-2 and ZeRO-3 refuse; so does
backward where a user has put a hook on it, which would fire twice. A branch runs twice a step, so what it counts
outside of buffers counts twice. `backward(inputs=..)` of parameters of the run alone reaches no node of it, so that it
gives nothing and nobody notices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import torch
from torch import Tensor, nn

from re2tal.reversible.coupling import SUM, Coupling, Merge
from re2tal.reversible.function import ReversibleRun
from re2tal.reversible.monitor import Monitor
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
    streams: int | None = None,
    coupling: Coupling = SUM,
    states: States = "float32",
    grid: GridStep = "auto",
    kinks: bool = False,
    owner: nn.Module | None = None,
    monitor: Monitor | None = None,
) -> Tensor:
    """Runs residual branches so that activations need not be saved; the output does not depend on `recompute`.

    Args:
        branches: F_0 .. F_{n-1}, or `ChunkedBranch`es, each from a floating tensor to one of the same shape. A branch
            must not hold on to its input, whose buffer is used again. Without branches, `x` is returned.
        x: the first state, any shape. It is never written.
        recompute: rebuild activations in backward; otherwise save them, as plain autograd does.
        saved_branches: how many branches, counted from the end, save their activations in spite of `recompute`.
        saved_outputs: how many others save their output; see `Run.branches_saving_output`.
        saved_attention: how many rebuilt branches save what their attention kernels return; see `saved_attention`.
        merge: "mean" is (x[n-1] + x[n]) / 2, the paper's; "extrapolate" is x[n-1] + x[n] - x; see `coupling`.
        streams: of networks that were born reversible: the axis along which `x` is x[-1] and x[0] side by side, and the
            output x[n-1] and x[n], without a merge.
        coupling: how states follow from the two before them; by default x[i+1] = x[i-1] + F_i(x[i]), as above.
        states, grid, kinks: the numbers that states are made of, and whether slopes of branches jump; see `precision`.
        owner: holds every parameter and buffer that the branches use. If neither its parameters nor `x` want a
            gradient, nothing is saved. Without one, a gradient is wanted and no buffer is written.
        monitor: compares the rebuilt first state with the original, in the steps that it chooses.

    Returns:
        The merged state, in the dtype of `x`; in float32 under autocast. It has a `Recipe` where it can be recomputed.

    Raises ValueError for a branch that changes shape or dtype, and for options that are unknown or exclude each other;
    in backward, RuntimeError for what is not supported. Supported: `backward()`, several losses in one, accumulation,
    hooks on modules inside branches and on parameters, checkpoints around the run, autocast, copies and pickles, ZeRO-1
    to ZeRO-3, DDP, FSDP2 of a module that holds the run, `torch.compile` around it and of modules inside. Not: FSDP1,
    second derivatives, a second backward, `autograd.grad` and `backward(inputs=..)` while parameters are trained,
    parameters exchanged before backward. See the top of this module for what branches may reach.
    """
    _check(x, merge, saved_branches=saved_branches, saved_outputs=saved_outputs, saved_attention=saved_attention)
    if not branches:
        return x
    # The last branches save: backward comes to them first, so their memory is free before it rebuilds a state.
    rebuilt = max(0, len(branches) - saved_branches) if recompute else 0
    precision = StateFormat.of(x, grid, coupling, states=states, kinks=kinks)
    run = Run(tuple(branches), rebuilt, saved_outputs, saved_attention, merge, coupling, precision, streams)
    run.check_streams(x)
    is_trained = torch.is_grad_enabled() and (x.requires_grad or _is_trained(owner))
    if is_trained and not rebuilt and not precision.dtype.is_floating_point:
        raise ValueError("autograd keeps no gradient of int32 states; set recompute, or states to 'float32'")
    if rebuilt and is_trained:
        _refuse_transforms()
        return _recomputed(run, x, owner, monitor)
    with same_kernels():
        # Nothing is rebuilt: plain operations, which autograd records if it is on.
        return run.merged(*run.states(x, run.output)[:3])


def _check(x: Tensor, merge: str, **numbers: int) -> None:
    if merge not in get_args(Merge):
        raise ValueError(f"unknown merge {merge!r}; known: {list(get_args(Merge))}")
    if not x.is_floating_point():
        raise ValueError(f"a reversible run needs floating point states, got {x.dtype}; convert x first")
    for name, number in numbers.items():
        if number < 0:
            raise ValueError(f"{name} is {number}; give a number of branches, 0 for none")


def _refuse_transforms() -> None:
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise RuntimeError(
            "a reversible run that is trained was called inside a transform of torch.func (grad, vmap, jvp), which "
            "cannot see through it; call it outside, freeze the parameters under torch.no_grad(), or run with "
            "recompute=False"
        )
    if torch.jit.is_tracing():
        raise RuntimeError(
            "torch.jit.trace cannot record a reversible run that is trained; trace it under torch.no_grad(), use "
            "torch.export, or run with recompute=False"
        )


def _recomputed(run: Run, x: Tensor, owner: nn.Module | None, monitor: Monitor | None) -> Tensor:
    """Returns the output of a run whose backward rebuilds the states."""
    # Parameters are no inputs of the Function, and x may want no gradient. If no input wanted one, autograd would not
    # record the Function, and the parameters would silently get no gradients. The anchor is an input that wants one.
    anchor = torch.empty(0, device=x.device, requires_grad=True)
    observation = monitor.observe(x, run.precision) if monitor else None
    output = ReversibleRun.apply(x, anchor, run, owner, observation)
    node: Any = output.grad_fn
    # Taken off the node, which would keep them on the device where hooks (offload) have moved the saved states away.
    ends, node.ends = node.ends, None
    return recomputable_from(output, ends, run.mean) if run.saves_its_ends() else output


def _is_trained(owner: nn.Module | None) -> bool:
    return owner is None or any(parameter.requires_grad for parameter in owner.parameters())
