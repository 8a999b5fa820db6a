"""The first step lets sound networks pass, whatever the size of their states, and refuses others each time."""

from __future__ import annotations

import logging

import pytest
import torch
from rewire.networks import CHANNELS, seeded
from torch import Tensor, nn

from re2tal.rewire import Branch, RewiringConfig, residual_branches, rewire


class Scaled(nn.Module):
    """x + scale * activation(linear(norm(x)))."""

    def __init__(self, scale: float = 1.0, *, activation: type[nn.Module] = nn.GELU) -> None:
        super().__init__()
        self.norm, self.linear, self.activation = nn.LayerNorm(CHANNELS), nn.Linear(CHANNELS, CHANNELS), activation()
        self.scale = scale
        self.clamps = False
        self.calls: list[int] | None = None

    def branch(self, x: Tensor) -> Tensor:
        if self.clamps:
            with torch.no_grad():
                self.linear.weight.clamp_(-0.1, 0.1)
        if self.calls is not None:
            self.calls.append(0)
        return self.activation(self.linear(self.norm(x))) * (self.scale + 0.01 * len(self.calls or ()))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


@residual_branches.register
def _(block: Scaled) -> tuple[Branch, ...]:
    return (Branch("branch", Scaled.branch),)


def network(*scales: float, activation: type[nn.Module] = nn.GELU, recompute: bool = True) -> nn.Module:
    blocks = seeded(lambda: nn.Sequential(*(Scaled(scale, activation=activation) for scale in scales)))
    net = nn.ModuleDict({"blocks": blocks.float()})
    net.forward = lambda x: net["blocks"](x)
    rewire(net, config=RewiringConfig(recompute=recompute, monitor_every=None))
    return net.train()


def x(scale: float = 1.0) -> Tensor:
    return torch.randn(64, CHANNELS, generator=torch.Generator().manual_seed(0)) * scale


@pytest.mark.parametrize(
    ("scales", "activation"),
    [
        ((1, 1, 1, 1, 100), nn.ReLU),  # the last state alone leaves the range of the grid, which is 64
        ((1, 1, 1, 1, -20), nn.ReLU),  # within it, but what is added is a multiple of half a step only
        ((1000, 1000, 1000, 1000), nn.GELU),  # without a grid: the last states are 1000 times as large as the first
    ],
)
def test_large_states_are_no_branch_that_changed(scales, activation) -> None:
    net, plain = (network(*scales, activation=activation, recompute=recompute) for recompute in (True, False))
    for one in (net, plain):
        one(x()).sum().backward()
    for found, wanted in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-2, atol=1e-2 * float(wanted.grad.abs().max()))


def test_an_input_of_zeros_passes_one_that_roundings_hide_is_named_and_one_between_is_warned_of(caplog) -> None:
    network(1, 1, 1, 1)(x(0)).sum().backward()
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        network(1, 1, 1, 1)(x(1e-4)).sum().backward()
    assert "rebuilds its first state with a relative error of" in caplog.text
    with pytest.raises(RuntimeError, match=r"later states are .* times as large and their roundings hide it; set grid"):
        network(1, 1, 1, 1)(x(1e-6)).sum().backward()


def test_weights_that_a_branch_clamps_itself_are_not_taken_for_those_of_another_step() -> None:
    net, plain = (network(1, 1, 1, recompute=recompute) for recompute in (True, False))
    for one in (net, plain):
        for block in one["blocks"].children():
            block.clamps = True
        one(x()).square().sum().backward()
    torch.testing.assert_close([one.grad for one in net.parameters()], [one.grad for one in plain.parameters()])


def test_whoever_catches_the_error_of_the_first_step_gets_it_again_in_the_second() -> None:
    net = network(1, 1, 1)
    net["blocks"].get_submodule("1").calls = []
    for _ in range(2):
        with pytest.raises(RuntimeError, match="gives something else when it runs again"):
            net(x()).sum().backward()


def test_weights_that_are_made_in_the_first_forward() -> None:
    found = []
    for recompute in (True, False):
        net = network(1, 1, recompute=recompute)
        for block in net["blocks"].children():
            block.linear = nn.LazyLinear(CHANNELS)
        torch.manual_seed(0)
        net(x()).square().sum().backward()
        found.append([parameter.grad for parameter in net.parameters()])
    torch.testing.assert_close(*found)
