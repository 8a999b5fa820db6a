"""Bits that flip in activations, and blocks whose states drift: what the monitor of rebuilt states sees of them."""

from __future__ import annotations

import logging
import random
from functools import partial

import pytest
import torch
from reversible.networks import CHANNELS, chain
from reversible.test_precision import autocast
from torch import Tensor, nn

from re2tal.reversible import run_reversibly
from re2tal.reversible.monitor import Monitor

FLIPS = 200
X = torch.randn(16, 32, CHANNELS, generator=torch.Generator().manual_seed(0))  # 4096 elements: all are sampled


class Flip:
    """One bit of the exponent of one number that a branch returns, in its forward or when it runs again."""

    def __init__(self, dice: random.Random, branches: list[nn.Module]) -> None:
        self.call, self.calls = dice.randrange(2), 0
        self.place, self.bit = dice.random(), dice.randrange(8)
        self.handle = dice.choice(branches).register_forward_hook(self.flip)

    def flip(self, module: nn.Module, given: tuple, returned: Tensor) -> Tensor:
        self.calls += 1
        if self.calls - 1 != self.call:
            return returned
        bits = returned.detach().clone()
        number, exponent = {2: (torch.int16, 7), 4: (torch.int32, 23)}[bits.element_size()]
        bits.view(-1).view(number)[int(self.place * bits.numel())] ^= 1 << exponent + self.bit
        return returned + (bits - returned.detach())


def alarms_of(branches: list[nn.Module], caplog) -> bool:
    caplog.clear()
    monitor = Monitor("layers.2", every=1)
    monitor.step()
    autocast(partial(run_reversibly, branches, monitor=monitor))(X).square().sum().backward()
    return any(record.levelno == logging.WARNING for record in caplog.records)


def test_a_flipped_exponent_bit_in_a_step_that_is_checked_raises_an_alarm(caplog, record_property):
    """Not where the drift stays below the monitor's limit, as for numbers that are nearly 0."""
    branches, dice, seen = chain("transformer", 12), random.Random(0), 0
    assert not alarms_of(branches, caplog)
    for _ in range(FLIPS):
        flip = Flip(dice, list(branches))
        seen += alarms_of(branches, caplog)
        assert flip.calls == 2
        flip.handle.remove()
    record_property("tried", FLIPS)
    record_property("held", seen)
    assert seen >= 0.8 * FLIPS


@pytest.mark.parametrize("scale", [1e3, 3e3, 1e4, 1e5, 1e6])
def test_a_block_whose_weights_are_scaled_raises_an_alarm(scale, caplog):
    branches = chain("transformer", 12)
    assert not alarms_of(branches, caplog)
    with torch.no_grad():
        for branch in branches[4:6]:
            for weight in branch.parameters():
                weight.mul_(scale)
    assert alarms_of(branches, caplog)
