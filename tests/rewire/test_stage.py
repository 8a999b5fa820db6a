"""What a rewired stage computes, and how it behaves in the place of a container."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from rewire.networks import CHANNELS, Block, Caller, PostNorm, ScaledBlock, frames, seeded, walker
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from re2tal.reversible.offload import offloaded
from re2tal.rewire import Branch, RewireError, RewiringConfig, residual_branches, rewire, unrewire
from re2tal.rewire import stage as stage_module

CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def coupled(functions, x):
    previous = current = x
    for function in functions:
        previous, current = current, previous + function(current)
    return (previous + current) / 2


def gradients(net, *args):
    net.zero_grad()
    output = net(*args)
    output.square().sum().backward()
    return [output.detach(), *(parameter.grad for parameter in net.parameters() if parameter.grad is not None)]


@pytest.mark.parametrize("recompute", [True, False])
def test_a_list_that_is_walked_along_gets_its_mask_in_every_branch(recompute) -> None:
    net, x = walker(Block, Block, Block), frames()
    mask = (torch.arange(16) < 9).double().expand(2, 16)
    h = net.stem(x)
    wanted = coupled([lambda z, f=f, b=b: f(b, z, mask) for b in net.layers for f in (Block.mix, Block.transform)], h)
    rewire(net, config=RewiringConfig(recompute=recompute))
    torch.testing.assert_close(net(x, mask), wanted, **CLOSE)


def test_a_stage_runs_what_is_not_residual_in_between() -> None:
    net, x = seeded(Caller), frames()
    first, second, third, fourth, block = net.stages[0]
    h = coupled([second.branch, third.branch], first(net.stem(x)))
    wanted = coupled([block.mix, block.transform], fourth(h))
    rewire(net)
    torch.testing.assert_close(net.stages[0](net.stem(x)), wanted, **CLOSE)


@pytest.mark.parametrize(
    "config", [{}, {"segment": 3}, {"unit": "block"}, {"unit": "block", "merge": "extrapolate", "segment": 2}]
)
def test_forgetting_activations_changes_no_gradient(config) -> None:
    nets = [walker(Block, Block, ScaledBlock, PostNormList, Block) for _ in range(2)]
    for net, recompute in zip(nets, (True, False), strict=True):
        rewire(net, config=RewiringConfig(recompute=recompute, **config))
    forgotten, kept = (gradients(net, frames()) for net in nets)
    assert len(forgotten) == len(list(nets[0].parameters())) + 1
    for found, wanted in zip(forgotten, kept, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def test_states_of_one_stage_in_host_memory_change_no_gradient(monkeypatch) -> None:
    entered = []
    monkeypatch.setattr(stage_module, "offloaded", lambda x: entered.append(x) or offloaded(x))
    found = []
    for offload in (True, False):
        net = Stages()
        rewire(net, config=RewiringConfig(segment=3))
        net.first.config = replace(net.first.config, offload=offload)
        found.append(gradients(net, torch.linspace(-1, 1, 80).double().view(2, 5, CHANNELS)))
    assert len(entered) == 2  # the runs of the first stage: 3 branches and 1
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_what_is_not_rebuilt_has_no_states_to_offload() -> None:
    with pytest.raises(ValueError, match=r"offload is set with recompute False and stored 0.* or leave offload out"):
        RewiringConfig(offload=True, recompute=False)
    with pytest.raises(ValueError, match=r"offload is set with recompute True and stored 1"):
        RewiringConfig(offload=True, stored=1)
    with pytest.raises(ValueError, match="stored is -1; give a number of units"):
        RewiringConfig(stored=-1)


class Stages(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = (nn.Sequential(Block(), Block()).double() for _ in range(2))

    def forward(self, x):
        return self.second(self.first(x))


class LinearEnd(Block):
    """A block whose MLP is known to end in a linear layer."""


@residual_branches.register
def _(block: LinearEnd) -> tuple[Branch, ...]:
    return Branch("mix", Block.mix, last="mixer"), Branch("mlp", Block.transform, last="mlp.2")


@pytest.mark.parametrize("around", [checkpoint_wrapper, lambda mlp: nn.Sequential(mlp, nn.ReLU())])
def test_what_is_put_around_a_branchs_last_layer_is_run(around) -> None:
    """A layer in there is not taken for the last one."""
    nets = [walker(LinearEnd, LinearEnd, LinearEnd) for _ in range(2)]
    for net, config in zip(nets, (RewiringConfig(known=9), RewiringConfig(recompute=False)), strict=True):
        rewire(net, config=config)
        for block in net.layers.children():
            block.mlp = around(block.mlp)
    known, kept = (gradients(net, frames()) for net in nets)
    torch.testing.assert_close(known, kept, **CLOSE)


@pytest.mark.parametrize("path", ["mlp", "mlp.2"])
def test_a_hook_on_a_branchs_last_layer_sees_numbers(path) -> None:
    nets = [walker(LinearEnd, LinearEnd, LinearEnd) for _ in range(2)]
    for net, config in zip(nets, (RewiringConfig(known=9), RewiringConfig(recompute=False)), strict=True):
        for block in net.layers:
            block.get_submodule(path).register_forward_hook(lambda layer, args, output: output.relu())
        rewire(net, config=config)
    known, kept = (gradients(net, frames()) for net in nets)
    torch.testing.assert_close(known, kept, **CLOSE)


class PostNormList(PostNorm):
    def forward(self, x, mask=None):
        return super().forward(x)


@pytest.mark.parametrize("segment", [1, 2])
@pytest.mark.parametrize("kinds", [(Block,) * 4, (Block, ScaledBlock, PostNormList, ScaledBlock, Block, Block)])
def test_extrapolated_segments_of_two_whole_blocks_are_the_network_before_rewiring(segment, kinds) -> None:
    net, x = walker(*kinds), frames()
    wanted = gradients(net, x)
    rewire(net, config=RewiringConfig(unit="block", merge="extrapolate", segment=segment))
    for found, want in zip(gradients(net, x), wanted, strict=True):
        torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-10)


def test_extrapolated_segments_of_two_branches_are_the_network_before_rewiring() -> None:
    """Of one block with two branches: x + F(x) + G(x + F(x)) either way."""
    net, x = walker(Block, Block, Block), frames()
    wanted = net(x)
    rewire(net, config=RewiringConfig(merge="extrapolate", segment=2))
    torch.testing.assert_close(net(x), wanted, rtol=1e-11, atol=1e-11)


def test_segments_merge_after_so_many_branches() -> None:
    net, x = walker(Block, Block), frames()
    functions = [lambda z, f=f, b=b: f(b, z) for b in net.layers for f in (Block.mix, Block.transform)]
    wanted = coupled(functions[3:], coupled(functions[:3], net.stem(x)))
    rewire(net, config=RewiringConfig(segment=3))
    torch.testing.assert_close(net(x), wanted, **CLOSE)


@pytest.mark.parametrize("unit", ["branch", "block"])
def test_the_output_has_the_form_of_the_last_block(unit) -> None:
    net = walker(Block, ScaledBlock)
    rewire(net, config=RewiringConfig(unit=unit))
    hidden, rest = net.layers(net.stem(frames()))
    assert hidden.shape == (2, 16, CHANNELS)
    assert rest is None


def test_a_branch_with_parameters_of_the_block_runs_inside_a_call_of_the_block() -> None:
    net, called = walker(ScaledBlock), []
    block = net.layers[0]

    def gather(module, args):
        called.append("parameters")

    gather.__module__ = "deepspeed.runtime.zero.parameter_offload"
    block.register_forward_pre_hook(gather)
    block.register_forward_pre_hook(lambda module, args: called.append("user"))
    rewire(net)
    net(frames()).sum().backward()
    # When its handle is called; in the branch, in forward, and in the rebuild.
    assert called == ["parameters", "user", "parameters", "parameters"]
    assert "forward" not in vars(block)
    assert block.scale.grad is not None


def test_a_block_with_a_forward_of_its_own_is_left_alone() -> None:
    net, x = walker(Block, Block), frames()
    own = net.layers[1].forward = lambda x, mask=None: 2 * x
    assert rewire(net).stages[0].left_alone == (
        "1: its forward was replaced on the instance, which no registration describes",
    )
    torch.testing.assert_close(net(x), 2 * coupled([net.layers[0].mix, net.layers[0].transform], net.stem(x)), **CLOSE)
    assert net.layers.get_submodule("1").forward is own


def test_a_forward_that_is_replaced_after_rewiring_is_an_error() -> None:
    net = walker(Block, Block)
    rewire(net)
    with pytest.raises(RewireError, match=r"the forward of block 1 of layers cannot be replaced: unrewire first"):
        net.layers[1].forward = lambda x: x
    net.layers.get_submodule("1").forward = lambda x, mask=None: x
    with pytest.raises(RewireError, match=r"the forward of block layers\.1 was replaced on the instance"):
        net(frames())


def test_the_forward_is_put_back_when_the_branch_fails() -> None:
    net = walker(ScaledBlock)
    rewire(net)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        net.layers(torch.ones(2, 3, CHANNELS + 1, dtype=torch.float64))
    assert "forward" not in vars(net.layers.get_submodule("0"))


def test_a_copy_uses_its_own_parameters() -> None:
    """As an average of weights does."""
    net = walker(Block, ScaledBlock)
    rewire(net)
    other, x = copy.deepcopy(net), frames()
    wanted = net(x)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(1)
    assert torch.equal(other(x), wanted)
    assert not torch.equal(net(x), wanted)


def test_a_move_to_other_numbers_reaches_the_blocks_in_either_form() -> None:
    net = walker(Block, Block)
    rewire(net)
    assert net.float()(frames().float()).dtype == torch.float32
    unrewire(net)
    assert net(frames().float()).dtype == torch.float32


def test_further_arguments_that_want_a_gradient_are_refused() -> None:
    net, x = walker(Block), frames()
    mask = torch.ones(2, 16, dtype=torch.float64, requires_grad=True)
    rewire(net)
    with pytest.raises(ValueError, match=r"a further argument that wants a gradient.* set recompute=False"):
        net(x, mask)
    with torch.no_grad():
        net(x, mask)
    plain = walker(Block)
    rewire(plain, config=RewiringConfig(recompute=False))
    plain(x, mask).sum().backward()
    assert mask.grad is not None


def test_handles_have_the_attributes_of_their_blocks() -> None:
    net = walker(Block, Block)
    rewire(net)
    stage = net.layers
    assert len(stage) == len(list(stage)) == 2
    assert stage[:2] is stage[:] is stage
    assert stage[-1].norm1 is stage.get_submodule("1").norm1
    stage[0].flag = 1
    assert stage.get_submodule("0").flag == 1
    assert repr(stage[:1][0]).startswith("block layers.0: Block(")
    halves = nn.ModuleDict({"blocks": nn.Sequential(Block(), Block())})
    rewire(halves)
    with pytest.raises(RewireError, match=r"of the rewired nn\.Sequential blocks cannot be run; iterate over"):
        halves["blocks"][:1]


class Crooked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(CHANNELS, 3)

    def forward(self, x, mask=None):
        return x


@residual_branches.register
def _(block: Crooked) -> tuple[Branch, ...]:
    return (Branch("narrowing", lambda block, x, mask=None: block.f(x)),)


def test_an_error_names_the_block_and_its_branch() -> None:
    net = walker(Block, Crooked)
    rewire(net)
    with pytest.raises(
        ValueError, match=r"branch 2 \(Crooked narrowing\) turns .* shape \(2, 16, 8\) into \(2, 16, 3\)"
    ):
        net(frames())


def test_a_frozen_stage_keeps_nothing() -> None:
    net = walker(Block, Block).requires_grad_(False)
    rewire(net)
    assert not net(frames()).requires_grad
    net.stem.requires_grad_(True)
    net(frames()).sum().backward()
    assert net.stem.weight.grad is not None
    assert all(parameter.grad is None for parameter in net.layers.parameters())


def test_a_stage_prints_its_configuration_and_blocks() -> None:
    net = walker(Block, ScaledBlock)
    rewire(net, config=RewiringConfig(segment=4))
    lines = repr(net.layers).splitlines()
    assert lines[0] == "RewiredStage("
    assert "segment=4" in lines[1]
    assert lines[2].strip() == "(0): Block("


def test_steps_after_the_first_do_not_wait_for_the_device(monkeypatch) -> None:
    net = walker(Block, Block, Block).train()
    rewire(net, config=RewiringConfig(saved_attention=1, known=1))
    waits: list[str] = []
    for name in ("item", "tolist", "__bool__", "__float__", "__int__"):
        usual = getattr(torch.Tensor, name)

        def read(tensor, *, name=name, usual=usual):
            waits.append(name)
            return usual(tensor)

        monkeypatch.setattr(torch.Tensor, name, read)
    for step in range(3):
        net(frames()).square().sum().backward()
        assert waits == ["tolist"], step
