"""Encodes the clips of long videos group by group, so that memory does not grow with their number.

    forward     for every group:  features[group] = encode(clips[group]), which saves nothing but the generators' state
    backward    for every group:  encodes it again, this time with a graph, and differentiates it

It costs one more forward, and gives the gradients of one graph over all groups: sums over groups are in float32 at
least. What is alive at once is the inside of one group, the features of all, and those sums.

A hook on a parameter must fire once per backward, with the whole gradient: ZeRO and DDP start to reduce it then. So the
gradients of all groups but the last are taken off the parameters as soon as they are there, with hooks silenced, and
are added to the last group's on their way in.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from re2tal.reversible.chunking import GradientSums, silenced
from re2tal.reversible.fake import is_counted
from re2tal.reversible.first_parts import takes_first_parts
from re2tal.reversible.recompute import save_recipes
from re2tal.reversible.replay_context import AutocastState, ModuleState, attention_kernels, same_kernels
from re2tal.reversible.rng import GeneratorState

Cut = Callable[[Tensor], Tensor]
"""All frames -> the clips of one group."""


def encode_in_groups(
    encode: Callable[[Tensor], Tensor], cuts: Sequence[Cut], frames: Tensor, *, spans: Sequence[slice], owner: nn.Module
) -> Tensor:
    """Features of all groups, (B, clips, ..).

    Args:
        encode: (B, clips of the group, ..) -> (B, clips of the group, ..); clips must not depend on each other.
        cuts: one function per group, from `frames` to its clips. They must give the same bits each time.
        frames: what they cut. Autograd saves it, or its `Recipe` where it has one: writing to it before backward is an
            error.
        spans: the place of each group in the second axis of the result; the last ends it.
        owner: the module that holds every parameter that `encode` uses.

    Raises ValueError for parameters that FSDP holds, or DDP without a static graph, and for BatchNorm in training, or
    another buffer that encoding writes; and RuntimeError, in backward, for a second one, one with `create_graph`, one
    for chosen tensors, and other parameters.
    """
    if any(isinstance(module, _BatchNorm) and module.training for module in owner.modules()):
        raise ValueError(
            "clips are encoded in groups (backbone.clips_at_once), but a BatchNorm takes its statistics from all clips "
            "of a batch; set backbone.norm_eval, or leave clips_at_once out"
        )
    trained = [parameter for parameter in owner.parameters() if parameter.requires_grad]
    if not torch.is_grad_enabled() or not (trained or frames.requires_grad):
        return _features(partial(_encoded, encode, cuts, frames), spans)
    if _held_in_parts(trained):
        raise ValueError(
            "clips are encoded in groups (backbone.clips_at_once), which needs whole gradients, but FSDP holds the "
            "parameters in parts; train under ZeRO, or leave clips_at_once out"
        )
    if trained and takes_first_parts():
        raise ValueError(
            "clips are encoded in groups (backbone.clips_at_once), each of which has a part of every gradient, but "
            "DistributedDataParallel would reduce the first part alone; give it static_graph=True, or leave "
            "clips_at_once out"
        )
    anchor = torch.empty(0, requires_grad=True)
    return _Groups.apply(frames, anchor, encode, cuts, spans, owner, save_recipes(frames))


def _held_in_parts(parameters: Sequence[nn.Parameter]) -> bool:
    """Whether FSDP holds one of them. Who shards has imported the module of its tensors, which is slow to import."""
    tensors = sys.modules.get("torch.distributed.tensor")
    return tensors is not None and any(isinstance(parameter, tensors.DTensor) for parameter in parameters)


def _features(encoded: Callable[[int], Tensor], spans: Sequence[slice]) -> Tensor:
    """Puts the groups together. Where only bytes are counted, equal groups are left out."""
    first = encoded(0)
    features = first.new_empty(first.shape[0], spans[-1].stop, *first.shape[2:])
    features[:, spans[0]] = first
    for index in _decisive(spans, counted=is_counted(first))[1:]:
        features[:, spans[index]] = encoded(index)
    return features


def _decisive(spans: Sequence[slice], *, counted: bool) -> list[int]:
    """The groups that run: all, or those that differ: the first two, as sums begin there, and the last.

    The one before the last is there as well, unless it is as long as the second.
    """
    number, lengths = len(spans), [span.stop - span.start for span in spans]
    chosen = {0, 1, number - 1} | ({number - 2} if lengths[number - 2] != lengths[:2][-1] else set())
    return [index for index in range(number) if not counted or index in chosen]


def _encoded(encode: Callable[[Tensor], Tensor], cuts: Sequence[Cut], frames: Tensor, index: int) -> Tensor:
    return encode(cuts[index](frames))


def _versions(owner: nn.Module) -> dict[str, tuple[Tensor, int]]:
    return {name: (one, one._version) for name, one in owner.named_buffers() if not one.is_inference()}


def _refuse_written(owner: nn.Module, after_first: Mapping[str, tuple[Tensor, int]]) -> None:
    """ValueError where later groups wrote or exchanged a buffer: backward encodes again, and would find what they left.

    What the first group alone makes is a table, which the others find.
    """
    for name, (one, version) in _versions(owner).items():
        first, before = after_first.get(name, (one, version))
        if first is not one or before != version:
            raise ValueError(
                f"clips are encoded in groups (backbone.clips_at_once), but each group writes {name}, a buffer, which "
                "all clips at once write once; leave clips_at_once out, or keep that module in evaluation mode"
            )


class _Groups(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        frames: Tensor,
        anchor: Tensor,
        encode: Callable[[Tensor], Tensor],
        cuts: Sequence[Cut],
        spans: Sequence[slice],
        owner: nn.Module,
        again: Callable[[], tuple[Tensor, ...]],
    ) -> Tensor:
        ctx.encode, ctx.cuts, ctx.spans, ctx.again, ctx.modules = encode, cuts, spans, again, ModuleState(owner)
        ctx.autocast, ctx.attention, ctx.draws = AutocastState.now(frames.device), attention_kernels(), {}
        frames = frames.detach()
        buffers: dict[str, tuple[Tensor, int]] = {}

        def encoded(index: int) -> Tensor:
            before = GeneratorState.now(frames.device)
            features = _encoded(encode, cuts, frames, index)
            buffers.update({} if buffers else _versions(owner))
            # Most draw nothing: states of some kilobytes each need not be kept.
            ctx.draws[index] = None if before.same_as(GeneratorState.now(frames.device)) else before
            return features

        with same_kernels():
            features = _features(encoded, spans)
        _refuse_written(owner, buffers)
        ctx.modules.ran()
        return features

    @staticmethod
    @torch._disable_dynamo
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "clips that are encoded in groups have no second derivatives: backward was called with "
                "create_graph=True; call it without, or leave backbone.clips_at_once out"
            )
        ctx.modules.check()
        trained = [one for one in ctx.modules.parameters() if one.requires_grad]
        if trained and not torch._C._will_engine_execute_node(ctx.next_functions[1][0]):
            raise RuntimeError(
                "gradients of chosen tensors were asked for (autograd.grad, or backward(inputs=..)), but clips that "
                "are encoded in groups give those of parameters to their .grad only; call backward() for all, freeze "
                "the parameters, or leave backbone.clips_at_once out"
            )
        (frames,) = ctx.again()
        frames = frames.detach().requires_grad_(ctx.needs_input_grad[0])
        chosen = _decisive(ctx.spans, counted=is_counted(gradient))
        sums = GradientSums()
        with same_kernels(ctx.attention), ctx.modules.as_in_forward():
            with _collecting(trained, sums):
                for index in chosen[:-1]:
                    _differentiate(ctx, index, frames, gradient)
            with sums.completing():
                _differentiate(ctx, chosen[-1], frames, gradient)
        if lost := len(sums.sums):
            raise RuntimeError(f"the last group of clips does not use {lost} parameters that other groups use")
        return frames.grad, *[None] * 6


def _differentiate(ctx: Any, index: int, frames: Tensor, gradient: Tensor) -> None:
    draws = ctx.draws[index]
    with torch.enable_grad(), ctx.autocast.replayed(), draws.replayed() if draws else nullcontext():
        output = _encoded(ctx.encode, ctx.cuts, frames, index)
    torch.autograd.backward((output,), (gradient[:, ctx.spans[index]].to(output.dtype),))


@contextmanager
def _collecting(parameters: Sequence[Tensor], sums: GradientSums) -> Iterator[None]:
    """Inside, what comes to `.grad` goes into `sums` at once, and no other hook sees it."""

    def take(parameter: Tensor) -> None:
        part, parameter.grad = parameter.grad, None
        assert part is not None
        sums.add(parameter, part)

    before = {parameter: parameter.grad for parameter in parameters}
    with silenced(parameters), ExitStack() as stack:
        for parameter in parameters:
            parameter.grad = None
            stack.callback(parameter.register_post_accumulate_grad_hook(take).remove)
        try:
            yield
        finally:
            for parameter, gradient in before.items():
                parameter.grad = gradient
