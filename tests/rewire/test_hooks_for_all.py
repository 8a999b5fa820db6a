"""Hooks on all modules fire for the blocks of a rewired network as they do for those of the plain one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from rewire.networks import Block, ScaledBlock, Walker, frames, walker
from torch import nn
from torch.nn.modules import module as of_all
from torch.utils.flop_counter import FlopCounterMode

from re2tal.rewire import RewireError, RewiringConfig, rewire


@contextmanager
def hooked(register: Callable, hook: Callable) -> Iterator[None]:
    handle = register(hook)
    try:
        yield
    finally:
        handle.remove()


def calls(net: nn.Module) -> Counter:
    """By type of module, in a forward."""
    found: Counter = Counter()
    with (
        hooked(of_all.register_module_forward_hook, lambda module, *_: found.update([type(module)])),
        hooked(of_all.register_module_forward_pre_hook, lambda module, *_: found.update([f"{type(module)} before"])),
    ):
        net(frames())
    return found


@pytest.mark.parametrize("unit", ["branch", "block"])
@pytest.mark.parametrize("kind", [Block, ScaledBlock])
def test_they_fire_once_for_every_block(kind, unit) -> None:
    net = walker(kind, kind, kind)
    wanted = calls(net)
    rewire(net, config=RewiringConfig(unit=unit))
    assert calls(net) == wanted


@pytest.mark.parametrize("unit", ["branch", "block"])
def test_one_on_the_last_block_of_a_run_fires_once(unit) -> None:
    net, seen = walker(Block, Block), []
    rewire(net, config=RewiringConfig(unit=unit))
    wanted = net(frames())
    net.layers.get_submodule("1").register_forward_hook(lambda block, args, output: seen.append(output.detach() + 0))
    net(frames()).sum().backward()
    torch.testing.assert_close(seen, [wanted.detach()])


@pytest.mark.parametrize("unit", ["branch", "block"])
def test_one_that_changes_outputs_changes_what_it_changes_in_the_plain_network(unit) -> None:
    net, x = walker(Block, ScaledBlock, Block), frames()

    def change(module: nn.Module, args: tuple, output):
        return 1.01 * output if isinstance(module, Block | nn.Linear | Walker) else None

    with hooked(of_all.register_module_forward_hook, change):
        wanted = net(x)
        rewire(net, config=RewiringConfig(unit=unit, beta=0.0), example=(x,))
        torch.testing.assert_close(net(x), wanted, rtol=1e-12, atol=1e-12)


def test_one_that_reads_a_state_inside_of_a_run_is_an_error() -> None:
    net = walker(Block, Block)
    rewire(net)
    reads = hooked(of_all.register_module_forward_hook, lambda block, args, output: output + 0)
    with reads, pytest.raises(RewireError, match=r"behind block layers\.0 is used by something else .* a hook"):
        net(frames())


def test_those_of_backward_are_refused() -> None:
    net = walker(Block, Block)
    rewire(net)
    with (
        hooked(of_all.register_module_full_backward_hook, lambda *_: None),
        pytest.raises(RewireError, match=r"block layers\.0 has a backward hook, .* would leave the blocks out"),
    ):
        net(frames())


def test_multiplications_of_a_step_are_counted() -> None:
    """By a mode of torch that hooks all modules itself; the branches run once more in backward."""
    net = walker(Block, Block)
    with FlopCounterMode(display=False) as plain:
        net(frames()).sum().backward()
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        net.layers[0](net.layers[1](net.stem(frames())))
    rewire(net)
    with FlopCounterMode(display=False) as counter:
        net(frames()).sum().backward()
    stem = 2 * frames().numel() * 8
    assert counter.get_total_flops() == plain.get_total_flops() + forward.get_total_flops() - stem
