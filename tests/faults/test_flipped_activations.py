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
X = torch.randn(16, 32, CHANNELS, generator=torch.Generator().manual_seed(0))


class Flip:
    """One bit of the exponent of one number that a branch returns, in its forward or when it runs again."""

    def __init__(self, dice: random.Random, branches: list[nn.Module]) -> None:
        self.call, self.calls = dice.randrange(2), 0
        self.place, self.bit = dice.random(), dice.randrange(8)
        self.branch = dice.choice(branches)
        self.handle = self.branch.register_forward_hook(self.flip)

    def flip(self, module: nn.Module, given: tuple, returned: Tensor) -> Tensor:
        self.calls += 1
        if self.calls - 1 != self.call:
            return returned
        bits = returned.detach().clone()
        number, exponent = {2: (torch.int16, 7), 4: (torch.int32, 23)}[bits.element_size()]
        bits.view(-1).view(number)[int(self.place * bits.numel())] ^= 1 << exponent + self.bit
        return returned + (bits - returned.detach())


def alarms_of(branches: nn.ModuleList, caplog) -> bool:
    caplog.clear()
    monitor = Monitor("layers.2", every=1)
    monitor.step()
    branches.zero_grad()
    autocast(partial(run_reversibly, branches, monitor=monitor))(X).square().sum().backward()
    return any(record.levelno == logging.WARNING for record in caplog.records)


def test_a_flipped_exponent_bit_in_a_step_that_is_checked_is_noticed_or_changes_no_gradient(caplog, record_property):
    """Noticed by the monitor, or because gradients are not finite: then the step is skipped.

    Not in the first branch's forward, whose output is not rebuilt.
    """
    branches, dice, missed, harmless = chain("transformer", 12), random.Random(0), 0, 0
    assert not alarms_of(branches, caplog)
    sound = [weight.grad.clone() for weight in branches.parameters()]
    for _ in range(FLIPS):
        flip = Flip(dice, list(branches))
        seen = alarms_of(branches, caplog)
        gradients = [weight.grad for weight in branches.parameters()]
        seen |= not all(bool(gradient.isfinite().all()) for gradient in gradients)
        harmless += not seen and all(map(torch.equal, gradients, sound))
        if not seen and not all(map(torch.equal, gradients, sound)):
            missed += 1
            assert (flip.call, flip.branch) == (0, branches[0])
        assert flip.calls == 2
        flip.handle.remove()
    record_property("tried", FLIPS)
    record_property("held", FLIPS - missed)
    assert missed <= 0.05 * FLIPS
    assert harmless <= 0.1 * FLIPS


@pytest.mark.parametrize("scale", [1e3, 3e3, 1e4, 1e5, 1e6])
def test_a_block_whose_weights_are_scaled_raises_an_alarm(scale, caplog):
    branches = chain("transformer", 12)
    assert not alarms_of(branches, caplog)
    with torch.no_grad():
        for branch in branches[4:6]:
            for weight in branch.parameters():
                weight.mul_(scale)
    assert alarms_of(branches, caplog)
