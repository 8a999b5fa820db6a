"""A rewired model among the tools of PyTorch: the same as a plain one, or an error that says what to do."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from rewire.networks import CHANNELS, Block, Caller, frames, seeded, walker
from torch import nn
from torch.func import functional_call

from re2tal.rewire import RewiringConfig, rewire, stages_of


def rewired(*, example: bool = False, recompute: bool = True) -> nn.Module:
    net = walker(Block, Block, Block)
    rewire(net, config=RewiringConfig(recompute=recompute), example=(frames(),) if example else None)
    return net


def gradients(net: nn.Module, forward=None) -> list[torch.Tensor]:
    net.zero_grad()
    (net if forward is None else forward)(frames()).square().sum().backward()
    return [parameter.grad.clone() for parameter in net.parameters() if parameter.grad is not None]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def saved_and_loaded(net: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "pickle": lambda net: pickle.loads(pickle.dumps(net)),
    "torch.save": saved_and_loaded,
    "deepcopy": copy.deepcopy,
}


@pytest.mark.parametrize("example", [False, True])
@pytest.mark.parametrize("name", COPIES)
def test_a_copy_is_the_same_network_and_stands_alone(name, example) -> None:
    net = rewired(example=example)
    wanted = gradients(net)
    other = COPIES[name](net)
    assert same(gradients(other), wanted)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    assert same(gradients(other), wanted)


@pytest.mark.parametrize("name", COPIES)
def test_a_copy_of_blocks_whose_branches_have_no_name(name) -> None:
    """A RevNet's cuts are local functions."""
    from re2tal.backbones.born_reversible.revnet import SIZES, RevNet

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = RevNet(**SIZES["revnet_nano"]).eval()
    pictures, mask = torch.randn(1, 3, 1, 16, 16), torch.ones(1, 1, dtype=torch.bool)
    rewire(net)
    other = COPIES[name](net)
    assert len(stages_of(other)) == 2
    found = [one(pictures, mask).values for one in (net, other)]
    assert torch.equal(*found)


class Unknown(nn.Module):
    """A block that nobody registered."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(CHANNELS, CHANNELS)

    def forward(self, x, mask=None):
        return x + self.f(x).tanh()


def test_blocks_that_were_taken_apart_are_copied_but_not_pickled() -> None:
    net = walker(Unknown, Unknown)
    rewire(net, example=(frames(),))
    assert torch.equal(copy.deepcopy(net)(frames()), net(frames()))
    with pytest.raises(TypeError, match=r"blocks were taken apart by what they do \(layers\.0\): save its state_dict"):
        pickle.dumps(net)


class LowRank(nn.Module):
    """A frozen linear layer and a trained update of low rank, as peft puts it in the layer's place."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(2, base.in_features, dtype=base.weight.dtype) / 4)
        self.up = nn.Parameter(torch.randn(base.out_features, 2, dtype=base.weight.dtype) / 4)

    def forward(self, x):
        return self.base(x) + x @ self.down.T @ self.up.T


@pytest.mark.parametrize("known", [0, 2])
def test_low_rank_updates_that_replace_layers_inside_blocks_are_trained(known) -> None:
    nets = []
    for recompute in (True, False):
        net = walker(Block, Block, Block)
        rewire(net, config=RewiringConfig(recompute=recompute, known=known))
        net.requires_grad_(False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            for path, layer in list(net.layers.named_modules()):
                if isinstance(layer, nn.Linear):
                    parent, _, name = path.rpartition(".")
                    setattr(net.layers.get_submodule(parent), name, LowRank(layer))
        nets.append(net)
    found, wanted = map(gradients, nets)
    assert len(found) == 2 * 3 * 3
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


# ----------------------------------------------------------------------------------------------------------- autograd


CHOSEN = {
    "grad of all": lambda net, loss: torch.autograd.grad(loss, list(net.parameters())),
    "grad, unused allowed": lambda net, loss: torch.autograd.grad(loss, list(net.parameters()), allow_unused=True),
    "grad outside of the run": lambda net, loss: torch.autograd.grad(loss, list(net.stem.parameters())),
    "backward of all": lambda net, loss: loss.backward(inputs=list(net.parameters())),
}


@pytest.mark.parametrize("name", CHOSEN)
def test_gradients_of_chosen_tensors_are_an_error(name) -> None:
    net = rewired()
    with pytest.raises(RuntimeError, match=r"gradients of chosen tensors were asked for .* call backward\(\) for all"):
        CHOSEN[name](net, net(frames()).sum())
    assert all(parameter.grad is None for parameter in net.parameters())
    net = rewired(recompute=False)
    CHOSEN[name](net, net(frames()).sum())


def test_the_gradient_of_the_input_of_a_frozen_network_can_be_asked_for() -> None:
    found = []
    for recompute in (True, False):
        net = rewired(recompute=recompute).requires_grad_(False)
        x = frames().requires_grad_()
        found += torch.autograd.grad(net(x).square().sum(), x)
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", [torch.Tensor.requires_grad_, nn.Parameter, lambda one: one.requires_grad_() * 1])
def test_parameters_that_are_others_in_backward_are_an_error(kind) -> None:
    net = rewired()
    others = {name: kind(parameter.detach() * 2) for name, parameter in net.named_parameters()}
    loss = functional_call(net, others, (frames(),)).sum()
    with pytest.raises(RuntimeError, match=r"has changed between .*it is another tensor: functional_call\?"):
        loss.backward()


def test_a_functional_call_with_the_own_parameters_is_a_call() -> None:
    net = rewired()
    wanted = gradients(net)
    assert same(gradients(net, lambda x: functional_call(net, dict(net.named_parameters()), (x,))), wanted)


# ------------------------------------------------------------------------------------------------------------- compile


def stepping(net: nn.Module):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)

    def step(x: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        loss = net(x).square().sum()
        loss.backward()
        optimizer.step()
        return loss

    return step


@pytest.mark.parametrize("build", [lambda: walker(Block, Block, Block), lambda: seeded(Caller)])
def test_compiled_models_and_compiled_steps_have_the_gradients_of_eager_ones(build) -> None:
    torch._dynamo.reset()
    net = build()
    rewire(net)
    wanted = gradients(net)
    compiled = torch.compile(net, backend="aot_eager")
    for _ in range(2):
        assert same(gradients(net, compiled), wanted)
    net.zero_grad()
    torch.compile(stepping(net), backend="aot_eager")(frames())
    assert same([parameter.grad for parameter in net.parameters() if parameter.grad is not None], wanted)


def test_blocks_may_be_compiled_inside() -> None:
    torch._dynamo.reset()
    net = rewired()
    wanted = gradients(net)
    for layer in net.layers:
        layer.mlp.compile(backend="aot_eager")
    for _ in range(2):
        for one, other in zip(gradients(net), wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_a_trace_of_a_network_that_is_trained_is_refused_and_of_one_that_is_not_is_exact() -> None:
    net, others = rewired(), frames() + 1
    with pytest.raises(RuntimeError, match=r"torch.jit.trace cannot record .* trace it under torch.no_grad\(\)"):
        torch.jit.trace(net, (frames(),))
    with torch.no_grad():
        traced = torch.jit.trace(net, (frames(),), check_trace=False)
        assert torch.equal(traced(others), net(others))


def test_an_exported_network_is_the_same() -> None:
    net, others = rewired(), frames() + 1
    exported = torch.export.export(net, (frames(),)).module()
    assert torch.equal(exported(others), net(others))
