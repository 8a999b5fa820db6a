"""Branches whose slope jumps: how they are told from smooth ones, and that their states are then rebuilt exactly."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from rewire.networks import CHANNELS, Block, Walker, frames, seeded, walker
from torch import Tensor, nn

from re2tal.rewire import Branch, RewiredStage, RewiringConfig, count_states, residual_branches, rewire, set_beta
from re2tal.rewire.branches import registered


class Declared(nn.Module):
    """Registered, with a ReLU that is no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(CHANNELS, CHANNELS)

    def branch(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return F.relu(self.f(x))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return x + self.branch(x)


@residual_branches.register
def _(block: Declared) -> tuple[Branch, ...]:
    return (Branch("declared", Declared.branch, kinks=True),)


class Unregistered(nn.Module):
    """Its function of any kind is hidden in a module inside."""

    def __init__(self, function=torch.tanh) -> None:
        super().__init__()
        self.norm, self.f, self.inner = nn.LayerNorm(CHANNELS), nn.Linear(CHANNELS, CHANNELS), Applied(function)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return x + self.inner(self.f(self.norm(x)))


class Applied(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class SmoothAtFirst(Block):
    """As its parent, whose registration holds for it."""


def stage_of(net: nn.Module, example: tuple | None = None) -> RewiredStage:
    rewire(net, example=example)
    return next(module for module in net.modules() if isinstance(module, RewiredStage))


def test_a_registration_says_so_or_a_layer_of_the_block_shows_it() -> None:
    assert registered(Declared()).kinks
    smooth = SmoothAtFirst()
    assert not registered(smooth).kinks
    smooth.mlp[1] = nn.ReLU6()
    assert registered(smooth).kinks


def test_one_block_with_kinks_is_enough_for_its_stage() -> None:
    assert not stage_of(walker(Block, Block)).kinks
    assert stage_of(walker(Block, Declared)).kinks


@pytest.mark.parametrize(
    ("function", "kinks"),
    [
        (F.relu, True),
        (lambda x: x.relu_(), True),
        (F.relu6, True),
        (F.leaky_relu, True),
        (F.hardswish, True),
        (lambda x: F.max_pool1d(x, 3, stride=1, padding=1), True),
        (nn.PReLU(), True),
        (lambda x: x.clamp(min=0), True),
        (lambda x: torch.maximum(x, -x), True),
        (lambda x: x + (x.round() - x).detach(), True),
        (lambda x: x * (x >= x.topk(2).values[..., -1:]), True),
        (lambda x: torch.where(x > 0, x, x / 2), True),
        (lambda x: x * x.sign(), True),
        (lambda x: x - x.median(-1, keepdim=True).values, True),
        (lambda x: x.clamp(-50, 50), False),
        (lambda x: x * (torch.rand(len(x), 1, 1) > 0.1), False),
        (F.gelu, False),
        (F.silu, False),
        (F.softplus, False),
        (lambda x: F.normalize(x, dim=-1), False),
    ],
)
def test_a_block_that_is_taken_apart_is_watched(function, kinks: bool) -> None:
    net = seeded(lambda: Walker(Unregistered(function)))
    assert stage_of(net, (frames(),)).kinks == kinks


def test_a_discovered_network_with_relus_has_the_bits_of_plain_autograd() -> None:
    """Float32, 40 blocks and half a million units, of which some would be turned on or off by a rounding."""

    def gradients(**options) -> list[Tensor]:
        net = seeded(lambda: Walker(*(Unregistered(F.relu) for _ in range(40)))).float()
        x = frames(batch=100).float()
        rewire(net, config=RewiringConfig(**options), example=(x[:1],))
        net(x).square().sum().backward()
        return [parameter.grad for parameter in net.parameters()]

    kept, rebuilt = gradients(recompute=False), gradients()
    assert all(torch.equal(one, other) for one, other in zip(kept, rebuilt, strict=True))


def test_on_the_way_to_the_coupling_every_state_is_kept_in_float32() -> None:
    for kind, all_kept in ((Declared, True), (Block, False)):
        net = walker(*[kind] * 8).float()
        rewire(net)
        assert count_states(net).kept == 2
        set_beta(net, 0.9)
        count = count_states(net)
        assert (count.kept == count.needed) == all_kept
        in_float64 = count_states(net.double())
        assert in_float64.kept < in_float64.needed
