"""Inputs that are made of something kept: convolutions keep that instead, to the same bits, and nothing runs twice."""

from __future__ import annotations

import weakref
from collections import Counter
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from re2tal.reversible.live_bytes import LiveBytes
from re2tal.rewire import recompute_conv_inputs


class Embedding(nn.Module):
    """Reads a view of what it is called with, through a layer that writes buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Conv2d(3, 8, kernel_size=4, stride=4)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.norm(self.projection(x.flatten(0, 1))))


def gather(frames: Tensor, index: Tensor) -> Tensor:
    return frames[:, index]


FRAMES, INDEX = (2, 4, 3, 16, 16), torch.tensor([3, 0, 2, 2, 1])
GATHERED_BYTES = 4 * 2 * 5 * 3 * 16 * 16


def inputs() -> tuple[Tensor, Tensor]:
    return torch.randn(FRAMES, generator=torch.Generator().manual_seed(1)), INDEX.clone()


def embedding() -> Embedding:
    torch.manual_seed(0)
    return Embedding()


def embedded(net: nn.Module, frames: Tensor, index: Tensor, *, keeps_sources: bool = True) -> Tensor:
    given = recompute_conv_inputs(net, gather, frames, index) if keeps_sources else nullcontext(gather(frames, index))
    with given as x:
        return net(x)


def trained(*, keeps_sources: bool, autocast: bool = False) -> dict[str, Tensor]:
    net, (frames, index) = embedding(), inputs()
    frames.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = embedded(net, frames, index, keeps_sources=keeps_sources)
    output.float().square().sum().backward()
    gradients = {key: parameter.grad for key, parameter in net.named_parameters()}
    return {"output": output.detach(), "frames": frames.grad} | gradients | dict(net.named_buffers())


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_outputs_gradients_and_buffers_are_the_same_bits(autocast: bool) -> None:
    found, wanted = (trained(keeps_sources=keeps, autocast=autocast) for keeps in (True, False))
    assert found.keys() == wanted.keys()
    assert [key for key, value in wanted.items() if not torch.equal(found[key], value)] == []


@pytest.mark.parametrize(("autocast", "width"), [(False, 1), (True, 2)], ids=["float32", "autocast"])
def test_what_is_made_is_gone_after_forward(autocast: bool, width: int) -> None:
    alive = []
    for keeps_sources in (False, True):
        net, (frames, index) = embedding(), inputs()
        with LiveBytes() as live, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = embedded(net, frames, index, keeps_sources=keeps_sources)
        assert output.requires_grad
        alive.append(live.live)
    assert alive[0] - alive[1] == GATHERED_BYTES // width


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[str(func)] += 1
        return func(*args, **(kwargs or {}))


def test_only_what_makes_it_is_run_once_more() -> None:
    seen = []
    for keeps_sources in (False, True):
        with Operations() as operations:
            embedded(embedding(), *inputs(), keeps_sources=keeps_sources).sum().backward()
        seen.append(operations.seen)
    kept, remade = seen
    free = {"aten.detach.default", "aten.as_strided.default", "aten.empty.memory_format", "aten.new_empty.default"}
    more = {name: count for name, count in (remade - kept).items() if name not in free}
    assert more == {"aten.index.Tensor": 1}
    assert remade["aten.convolution.default"] == remade["aten.convolution_backward.default"] == 1


@pytest.mark.parametrize("source", [0, 1])
def test_a_source_that_is_written_to_before_backward_is_noticed(source: int) -> None:
    given = inputs()
    output = embedded(embedding(), *given)
    given[source].add_(0)
    with pytest.raises(RuntimeError, match="somebody has written to them"):
        output.sum().backward()


def test_a_convolution_that_is_frozen_keeps_nothing() -> None:
    net, (frames, index) = embedding(), inputs()
    net.projection.requires_grad_(False)
    output = embedded(net, frames, index)
    alive = weakref.ref(frames.untyped_storage())
    del frames
    assert alive() is None
    output.sum().backward()
    assert net.norm.weight.grad is not None


def test_a_second_backward_makes_it_a_third_time() -> None:
    net = embedding()
    output = embedded(net, *inputs()).square().sum()
    output.backward(retain_graph=True)
    once = net.projection.weight.grad.clone()
    output.backward()
    assert torch.equal(net.projection.weight.grad, 2 * once)


@pytest.mark.parametrize("around", ["checkpoint", "save_on_cpu"])
def test_it_may_stand_inside_what_keeps_tensors_in_its_own_way(around: str) -> None:
    net, (frames, index) = embedding(), inputs()
    if around == "checkpoint":
        output = checkpoint(embedded, net, frames, index, use_reentrant=False)
    else:
        with save_on_cpu():
            output = embedded(net, frames, index)
    output.float().square().sum().backward()
    wanted = trained(keeps_sources=False)
    for key, parameter in net.named_parameters():
        assert torch.equal(parameter.grad, wanted[key]), key


def test_layers_that_are_called_with_something_else_keep_it() -> None:
    net, (frames, index) = embedding(), inputs()
    with recompute_conv_inputs(net, gather, frames, index) as x, LiveBytes() as live:
        net(x + 1).sum().backward()
        output = net(x * 2)
    assert output.requires_grad
    assert live.live >= GATHERED_BYTES


def test_no_hook_stays_behind_even_where_the_network_fails() -> None:
    net, (frames, index), seen = embedding(), inputs(), []
    with saved_tensors_hooks(lambda tensor: seen.append(tensor), lambda packed: packed):
        with pytest.raises(RuntimeError, match="Given groups=1"):
            embedded(net, frames[:, :, :2], index)
        seen.clear()
        torch.ones(2, requires_grad=True) * frames[0, 0, 0, 0, :2]
    assert len(seen) == 1  # by the hooks that were set first
    assert not net.projection._forward_pre_hooks
    assert not net.projection._forward_hooks


class Shifting(Embedding):
    """Writes to what it is called with."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x.clamp_(-0.1, 0.1)
        return super().forward(x)


class Checkpointing(Embedding):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)


@pytest.mark.parametrize("kind", [Shifting, Checkpointing])
def test_an_input_that_is_written_to_and_one_inside_a_checkpoint_are_saved_as_they_are(kind: type[Embedding]) -> None:
    found = []
    for keeps_sources in (True, False):
        torch.manual_seed(0)
        net = kind()
        embedded(net, *inputs(), keeps_sources=keeps_sources).sum().backward()
        found.append([parameter.grad for parameter in net.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
