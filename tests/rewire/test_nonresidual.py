"""Layers between reversible runs: forgotten and run again, they give the same gradients and write buffers once."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from math import prod

import pytest
import torch
from rewire.networks import CHANNELS, Block
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from re2tal.backbones import BackboneConfig, build_backbone
from re2tal.backbones.slowfast.network import SIZES
from re2tal.reversible.live_bytes import LiveBytes
from re2tal.reversible.recompute import saved_tensors_seen_by
from re2tal.rewire import (
    CheckpointedModule,
    RewiringConfig,
    checkpointed,
    residual_branches,
    rewire,
    unrewire,
    why_not_residual,
)

MASK = torch.ones(2, 16, dtype=torch.bool)


def frames(size: int = 40) -> Tensor:
    return torch.randn(2, 3, 16, size, size, generator=torch.Generator().manual_seed(1))


def trained(name: str, **fields: bool) -> dict[str, Tensor]:
    """Gradients and buffers after two steps with norms in training mode."""
    torch.manual_seed(0)
    backbone = build_backbone(BackboneConfig(name=name, **fields)).double().train()
    torch.manual_seed(1)
    for _ in range(2):
        backbone(frames().double(), MASK).values.square().mean().backward()
    found = {key: parameter.grad for key, parameter in backbone.named_parameters()}
    return found | {key: buffer.clone() for key, buffer in backbone.named_buffers()}


@pytest.mark.parametrize("name", ["swin3d_nano", "slowfast_nano"])
def test_forgetting_changes_neither_gradients_nor_buffers(name) -> None:
    found, wanted = (trained(name, recompute=recompute) for recompute in (True, False))
    assert found.keys() == wanted.keys()
    for key, want in wanted.items():
        torch.testing.assert_close(found[key], want, rtol=1e-9, atol=1e-9 * float(want.abs().max()), msg=key)
    assert {int(found[key]) for key in found if key.endswith("num_batches_tracked")} <= {2}


def test_what_is_kept_of_other_blocks_changes_no_bit_and_writes_buffers_once() -> None:
    found, wanted = (trained("slowfast_nano", keep_nonresidual=keep) for keep in (True, False))
    assert [key for key, want in wanted.items() if not torch.equal(found[key], want)] == []
    assert {int(found[key]) for key in found if key.endswith("num_batches_tracked")} == {2}


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_a_kept_block_saves_what_its_input_is_made_of_to_the_same_bits(autocast: bool, monkeypatch) -> None:
    def step(seen: dict[str, tuple[int, ...]]) -> tuple[list[tuple[int, ...]], list[Tensor | None]]:
        torch.manual_seed(0)
        backbone = build_backbone(BackboneConfig(name="slowfast_nano", keep_nonresidual=True)).eval()
        block = backbone.get_submodule("slow_path.layer2.0")
        block.register_forward_pre_hook(lambda _, args: seen.update(input=tuple(args[0].shape)))
        saved: list[tuple[int, ...]] = []
        look = saved_tensors_seen_by(lambda tensor: saved.append(tuple(tensor.shape)))
        with look, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            values = backbone(frames(), MASK).values
        values.float().square().mean().backward()
        return saved, [parameter.grad for parameter in backbone.parameters()]

    # A run of one branch keeps its input alone.
    monkeypatch.setitem(SIZES, "slowfast_nano", SIZES["slowfast_nano"] | {"depths": (3, 2, 2, 2)})
    seen: dict[str, tuple[int, ...]] = {}
    saved, found = step(seen)
    assert seen["input"] not in saved
    monkeypatch.setattr("re2tal.rewire.stage.saving_recipe", lambda block, x: nullcontext())
    saved, wanted = step(seen)
    assert seen["input"] in saved
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


def kept_outside_runs(net: nn.Module, x: Tensor) -> list[tuple[int, ...]]:
    """Shapes of what autograd saves, but for parameters, each storage once."""
    saved: dict[int, Tensor] = {parameter.untyped_storage()._cdata: parameter for parameter in net.parameters()}
    num_parameters = len(saved)

    with saved_tensors_seen_by(lambda tensor: saved.setdefault(tensor.untyped_storage()._cdata, tensor)):
        net(x)
    return [tuple(tensor.shape) for tensor in list(saved.values())[num_parameters:] if tensor.numel()]


class Narrow(nn.Module):
    """Not residual, as its family says."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.Linear(CHANNELS, 4 * CHANNELS), nn.GELU(), nn.Linear(4 * CHANNELS, CHANNELS))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.f(x))


@residual_branches.register
def _(block: Narrow) -> tuple:
    return ()


@why_not_residual.register
def _(block: Narrow) -> str:
    return "it is narrow in the middle"


class Unknown(Narrow):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Stem(CheckpointedModule):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(3, CHANNELS)

    @checkpointed
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(torch.sin(self.f(x)))


class Net(nn.Module):
    def __init__(self, between: type[nn.Module]) -> None:
        super().__init__()
        self.stem = Stem()
        self.blocks = nn.Sequential(Block(), between(), Block())

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.stem(x))


X, STATE = (2, 5, 3), (2, 5, CHANNELS)


def test_what_lies_between_runs_keeps_its_input_alone_and_not_even_that_behind_a_run() -> None:
    net = Net(Narrow)
    rewire(net)
    assert kept_outside_runs(net, torch.ones(X)) == [X, *[STATE] * 4]  # the stem's input, and two runs' states
    net.blocks.config = replace(net.blocks.config, merge="extrapolate")
    assert kept_outside_runs(net, torch.ones(X)) == [X, *[STATE] * 5]  # made of the run's input too, which is forgotten


class Dropping(Narrow):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.drop(x))


@residual_branches.register
def _(block: Dropping) -> tuple:
    return ()


def plainly(net: nn.Module, x: Tensor) -> Tensor:
    return net(x)


def saved_elsewhere(net: nn.Module, x: Tensor) -> Tensor:
    with save_on_cpu():
        return net(x)


def gradients(net: nn.Module, around: Callable[[nn.Module, Tensor], Tensor]) -> list[Tensor]:
    torch.manual_seed(0)
    around(net, torch.linspace(-1, 1, 30).view(X)).square().sum().backward()
    return [parameter.grad for parameter in net.parameters()]


@pytest.mark.parametrize(
    "around",
    [plainly, saved_elsewhere, partial(checkpoint, use_reentrant=False)],
    ids=["nothing", "copies", "checkpoint"],
)
@pytest.mark.parametrize("merge", ["mean", "extrapolate"])
def test_a_layer_behind_a_run_gets_the_same_bits_again(around, merge) -> None:
    """Its random draws too."""
    found = []
    for recompute in (True, False):
        torch.manual_seed(1)
        net = Net(Dropping)
        rewire(net, config=RewiringConfig(recompute=recompute, merge=merge, grid=2**-14))
        found.append(gradients(net, around if recompute else plainly))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@torch.no_grad()
def written(net: nn.Module) -> None:
    net.blocks.get_submodule("1").f[0].weight.mul_(2)


CHANGES = {
    r"f\.0\.weight, a parameter": written,
    r"f\.bias, a parameter": lambda net: setattr(net.stem.f, "bias", nn.Parameter(torch.ones(CHANNELS))),
}


def after_a_change(change: Callable[[nn.Module], object], *, recompute: bool = True) -> list[Tensor]:
    torch.manual_seed(1)
    net = Net(Dropping)
    rewire(net, config=RewiringConfig(recompute=recompute, grid=2**-14))
    loss = net(torch.linspace(-1, 1, 30).view(X)).square().sum()
    change(net)
    loss.backward()
    return [parameter.grad for parameter in net.parameters()]


@pytest.mark.parametrize("message", CHANGES)
def test_what_a_layer_uses_and_changes_before_backward_is_an_error(message) -> None:
    with pytest.raises(RuntimeError, match=rf"^{message} of .* a layer between two, .* has changed"):
        after_a_change(CHANGES[message])


@pytest.mark.parametrize("change", [nn.Module.eval, lambda net: setattr(net.blocks.get_submodule("1").drop, "p", 0.1)])
def test_a_layer_runs_again_in_the_modes_and_with_the_numbers_of_forward(change) -> None:
    found, wanted = (after_a_change(change, recompute=recompute) for recompute in (True, False))
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


def test_a_checkpoint_around_the_network_holds_no_states() -> None:
    net = Net(Narrow)
    rewire(net)
    net(torch.ones(X)).sum().backward()  # the first step is checked, for which a sample is kept
    with LiveBytes() as live:
        x = torch.ones(X)
        output = checkpoint(net, x, use_reentrant=False)
        assert live.live == x.nbytes + output.nbytes
    output.sum().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())


def test_a_second_backward_is_told_from_a_first() -> None:
    net = Net(Narrow)
    rewire(net)
    loss = net(torch.ones(X)).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward went through a reversible run twice"):
        loss.backward()


def test_blocks_that_are_not_residual_may_keep_their_activations_alone() -> None:
    """Runs are rebuilt, and the stem checkpoints, as it did."""
    net, calls = Net(Narrow), []
    net.blocks[1].register_forward_hook(lambda *_: calls.append("narrow"))
    net.blocks[0].mlp.register_forward_hook(lambda *_: calls.append("run"))
    net.stem.f.register_forward_hook(lambda *_: calls.append("stem"))
    rewire(net, config=RewiringConfig(keep_nonresidual=True))
    assert net.blocks.can_checkpoint_nonresidual()
    first, *others = kept_outside_runs(net, torch.ones(X))
    assert first == X
    # Besides what is kept anyway, tanh's output, GELU's, and what GELU was given.
    assert sorted(map(prod, others)) == [prod(STATE)] * (5 + 1) + [4 * prod(STATE)] * 2
    calls.clear()
    net(torch.ones(X)).sum().backward()
    assert [calls.count(name) for name in ("narrow", "run", "stem")] == [1, 2, 2]


def test_there_may_be_no_block_to_keep() -> None:
    net = Net(Unknown)  # nobody has said that it does the same twice, so it is kept anyway
    rewire(net)
    assert not net.blocks.can_checkpoint_nonresidual()


@pytest.mark.parametrize(("between", "recompute"), [(Unknown, True), (Narrow, False)])
def test_a_block_that_nobody_knows_and_one_that_is_told_to_keep_its_activations_keep_them(between, recompute) -> None:
    net = Net(between)
    rewire(net, config=RewiringConfig(recompute=recompute))
    assert (2, 5, 4 * CHANNELS) in kept_outside_runs(net, torch.ones(X))
    assert net.stem.checkpointing == recompute


def test_a_network_put_back_keeps_its_activations() -> None:
    net = Net(Narrow)
    before = kept_outside_runs(net, torch.ones(X))
    rewire(net)
    unrewire(net)
    assert kept_outside_runs(net, torch.ones(X)) == before


def test_without_gradients_nothing_is_run_twice() -> None:
    net, calls = Net(Narrow), []
    net.stem.f.register_forward_hook(lambda *_: calls.append(1))
    rewire(net)
    with torch.no_grad():
        net(torch.ones(X))
    assert len(calls) == 1
    net(torch.ones(X)).sum().backward()
    assert len(calls) == 3
