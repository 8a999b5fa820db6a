"""Rewiring in place: what changes, what must not, what is reported and what is refused."""

from __future__ import annotations

import pytest
import torch
from rewire.networks import CHANNELS, Block, Caller, Downsample, PostNorm, Walker, frames, seeded, walker
from torch import nn

from re2tal.rewire import Branch, RewiredStage, RewiringConfig, residual_branches, rewire, unrewire


def test_names_and_parameters_stay_the_same() -> None:
    net = seeded(Caller)
    before = {name: (parameter, parameter.data_ptr()) for name, parameter in net.named_parameters()}
    keys = list(net.state_dict())
    rewire(net)
    assert list(net.state_dict()) == keys
    for name, parameter in net.named_parameters():
        assert parameter is before[name][0]
        assert parameter.data_ptr() == before[name][1]


def test_weights_load_into_a_rewired_network_as_they_are() -> None:
    plain, other = seeded(Caller), seeded(Caller, seed=1)
    rewire(other)
    other.load_state_dict(plain.state_dict())
    rewire(plain)
    assert torch.equal(other(frames()), plain(frames()))


def test_unrewiring_gives_the_network_that_was() -> None:
    net = seeded(Caller)
    wanted, types = net(frames()), [type(module) for module in net.modules()]
    rewire(net)
    assert not torch.allclose(net(frames()), wanted)
    net.eval()
    unrewire(net)
    assert torch.equal(net(frames()), wanted)
    assert [type(module) for module in net.modules()] == types
    assert not any(module.training for module in net.modules())


def test_the_report_says_what_was_rewired_and_why_the_rest_was_not() -> None:
    assert str(rewire(seeded(Caller))).splitlines() == [
        "stage     blocks  rewired  branches of a block    left alone, because",
        "stages.0  5       3        bottleneck, mix + mlp  0, 3: it keeps one token in 2",
        "stages.1  5       3        bottleneck, mix + mlp  0, 3: it keeps one token in 2",
        "tail      2       0        -                      0, 1: nothing is registered for PostNorm",
        "",
        "outside of stages, left alone:",
        "  stem: no residual blocks",
    ]


def test_figures_of_the_report() -> None:
    report = rewire(walker(Block, PostNorm, Block))
    (stage,) = report.stages
    assert (stage.name, stage.blocks, stage.rewired_blocks, stage.branches) == ("layers", 3, 2, ("mix + mlp",))
    assert stage.left_alone == ("1: nothing is registered for PostNorm",)


def test_the_mode_of_a_container_is_kept() -> None:
    net = seeded(Caller).eval()
    rewire(net)
    assert not any(module.training for module in net.modules())


def test_an_optimizer_made_before_goes_on_after() -> None:
    net = walker(Block, Block)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    rewire(net)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    net(frames()).square().sum().backward()
    optimizer.step()
    assert all(not torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_a_container_that_hangs_in_two_places_is_one_stage() -> None:
    net = walker(Block, Block)
    net.alias = net.layers
    rewire(net)
    assert isinstance(net.layers, RewiredStage)
    assert net.alias is net.layers
    unrewire(net)
    assert type(net.layers) is nn.ModuleList
    assert net.alias is net.layers


def test_what_a_library_puts_on_every_module_is_no_reason_to_leave_a_container(monkeypatch) -> None:
    monkeypatch.setattr(nn.Module, "smart_apply", lambda module, function: None, raising=False)
    net = walker(Block, Block)
    rewire(net)
    assert isinstance(net.layers, RewiredStage)


def test_a_network_that_holds_nothing_residual_is_refused_with_the_reasons() -> None:
    with pytest.raises(ValueError, match=r"(?s)nothing in this Walker could be rewired; register residual_branches.*"):
        rewire(walker(PostNorm, PostNorm))
    with pytest.raises(ValueError, match=r"layers +2 +0 +- +0, 1: nothing is registered for PostNorm"):
        rewire(walker(PostNorm, PostNorm))
    with pytest.raises(ValueError, match=r"it holds no nn\.Sequential or nn\.ModuleList of blocks"):
        rewire(nn.Linear(2, 2))


def test_a_bare_container_is_refused() -> None:
    with pytest.raises(ValueError, match="this Sequential is itself a container of blocks; rewire a module that holds"):
        rewire(nn.Sequential(Block(), Block()))


def test_rewiring_twice_and_unrewiring_a_plain_network_are_refused() -> None:
    net = walker(Block)
    with pytest.raises(ValueError, match="this Walker is not rewired"):
        unrewire(net)
    rewire(net)
    with pytest.raises(ValueError, match="this Walker is rewired already; call unrewire"):
        rewire(net)


class Skipping(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)


def test_a_container_with_a_forward_of_its_own_is_left_alone() -> None:
    net = nn.ModuleDict({"own": Skipping(Block(), Block()), "plain": nn.Sequential(Block(), Block())})
    own, plain = rewire(net).stages
    assert own.left_alone == ("Skipping runs its blocks in a way of its own",)
    assert type(net["own"]) is Skipping
    assert plain.rewired_blocks == 2


def test_a_container_with_hooks_is_left_alone() -> None:
    net = nn.ModuleDict({"hooked": nn.Sequential(Block()), "plain": nn.Sequential(Block())})
    net["hooked"].register_forward_hook(lambda module, args, output: None)
    assert "has hooks, which would be lost" in rewire(net).stages[0].left_alone[0]


class Sharper(Block):
    def forward(self, x, mask=None):
        return 2 * super().forward(x, mask)


class Renamed(Block):
    pass


def test_a_subclass_with_another_forward_needs_its_own_registration() -> None:
    (stage,) = rewire(walker(Sharper, Renamed)).stages
    assert stage.rewired_blocks == 1
    assert stage.left_alone == ("0: Sharper changes the forward of Block, so it needs its own registration",)
    net = walker(Sharper, Renamed)
    rewire(net, config=RewiringConfig(merge="extrapolate", segment=2))
    torch.testing.assert_close(net(frames()), walker(Sharper, Renamed)(frames()), rtol=1e-10, atol=1e-10)


def test_a_block_type_is_residual_where_its_registration_says_so() -> None:
    assert residual_branches(Downsample(2)) == ()
    assert [branch.name for branch in residual_branches(Downsample(1))] == ["bottleneck"]
    assert residual_branches(nn.Linear(CHANNELS, CHANNELS)) == ()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"unit": "layer"}, r"unit is 'layer'; known: \['block', 'branch'\]"),
        ({"segment": 0}, "segment is 0; give at least 1 unit, or None"),
        ({"merge": "sum"}, r"merge is 'sum'; known: \['mean', 'extrapolate'\]"),
    ],
)
def test_unknown_options_are_refused_before_anything_is_changed(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        RewiringConfig(**options)


def test_lists_of_lists_are_searched() -> None:
    net = nn.ModuleDict({"deep": nn.ModuleList([nn.ModuleList([Walker(Block(), Block())])])})
    assert [stage.name for stage in rewire(net).stages] == ["deep.0.0.layers"]


class Widening(Block):
    """Its own forward fits; the branch registered for it does not."""

    def widen(self, x, mask=None):
        return self.mlp[0](x)


@residual_branches.register
def _(block: Widening) -> tuple[Branch, ...]:
    return Branch("mix", Block.mix), Branch("mlp", Widening.widen)


def test_a_block_that_gives_another_shape_is_named() -> None:
    message = r"\(Widening mlp\) turns a tensor of shape \(2, 16, 8\) into \(2, 16, 16\)"
    net = walker(Block, Widening)
    with pytest.raises(ValueError, match=message):
        rewire(net, example=(frames(),))
    rewire(net)
    with pytest.raises(ValueError, match=message):
        net(frames())
