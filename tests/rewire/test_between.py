"""What changes between forward and backward: brought back for backward, or an error; never the gradient of another."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rewire.networks import CHANNELS, Block, Walker, frames, seeded
from torch import Tensor, nn

from re2tal.rewire import Branch, RewireError, RewiringConfig, residual_branches, rewire


class Dropping(Block):
    """A block with dropout, and a factor that is no parameter."""

    factor = 1.0

    def mix(self, x, mask=None):
        return F.dropout(super().mix(x, mask), 0.3, self.training) * self.factor


@residual_branches.register
def _(block: Dropping) -> tuple[Branch, ...]:
    return Branch("mix", Dropping.mix), Branch("mlp", Block.transform)


def trained(*, recompute: bool = True, **options) -> Walker:
    """Behind its first step, which is checked."""
    net = seeded(lambda: Walker(*(Dropping() for _ in range(3)))).train()
    rewire(net, config=RewiringConfig(recompute=recompute, monitor_every=None, **options))
    net(frames()).sum().backward()
    net.zero_grad()
    return net


def gradients(between: Callable[[Walker], object], net: Walker) -> list[Tensor]:
    torch.manual_seed(3)
    loss = net(frames()).square().sum()
    between(net)
    loss.backward()
    return [parameter.grad for parameter in net.parameters()]


MODES = {
    "eval": lambda net: net.eval(),
    "eval inside": lambda net: net.layers.get_submodule("1").eval(),
    "eval and train again": lambda net: net.eval().train(),
}


@pytest.mark.parametrize("name", MODES)
@pytest.mark.parametrize("options", [{}, {"unit": "block"}, {"beta": 0.5}], ids=str)
def test_backward_runs_in_the_modes_of_forward_and_leaves_those_that_are(name, options) -> None:
    net = trained(**options)
    found, wanted = gradients(MODES[name], net), gradients(MODES[name], trained(recompute=False, **options))
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    after = trained()
    MODES[name](after)
    assert [module.training for module in net.modules()] == [module.training for module in after.modules()]


def write(net: Walker) -> None:
    with torch.no_grad():
        for parameter in net.layers.parameters():
            parameter.mul_(2)


CHANGES = {
    "written": (write, r"0.norm1.weight, a parameter .* has changed .*it was written to in place"),
    "loaded": (lambda net: net.load_state_dict(net.state_dict()), "it was written to in place"),
    "frozen": (lambda net: net.layers.requires_grad_(False), "requires_grad was True, and is False"),
    "assigned": (
        lambda net: net.load_state_dict({k: v * 2 for k, v in net.state_dict().items()}, assign=True),
        "it is another tensor",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_parameters_that_change_are_an_error(name) -> None:
    change, message = CHANGES[name]
    with pytest.raises(RuntimeError, match=message):
        gradients(change, trained())


def test_what_was_frozen_in_forward_gets_no_gradient_in_backward() -> None:
    net = trained()
    net.layers.requires_grad_(False)
    with pytest.raises(RuntimeError, match="requires_grad was False, and is True"):
        gradients(lambda net: net.layers.requires_grad_(True), net)


@pytest.mark.parametrize("unit", ["branch", "block"])
def test_an_argument_that_is_written_to_is_an_error(unit) -> None:
    net, mask = trained(unit=unit), torch.ones(2, 16, dtype=torch.float64)
    loss = net(frames(), mask=mask).sum()
    mask.mul_(2)
    with pytest.raises(RewireError, match=r"an argument of block layers\.2 was written to .* or before backward"):
        loss.backward()


def test_another_block_in_the_place_of_one_is_an_error() -> None:
    class Other(Dropping):
        def forward(self, x, mask=None):
            return super().forward(x, mask) + 1

    net = trained()
    net.layers.add_module("1", seeded(Other))
    with pytest.raises(RewireError, match=r"block layers\.1 is a Other, and was a Dropping when .* unrewire the model"):
        net(frames())
    net.layers.add_module("1", seeded(Dropping))
    net(frames())


class Drawing(Block):
    """Draws from `draw`."""

    draw = staticmethod(random.random)

    def mix(self, x, mask=None):
        return super().mix(x, mask) * (type(self).draw() < 2)


@residual_branches.register
def _(block: Drawing) -> tuple[Branch, ...]:
    return Branch("mix", Drawing.mix), Branch("mlp", Block.transform)


@pytest.mark.parametrize("draw", [random.random, np.random.rand])
def test_draws_that_backward_could_not_repeat_are_refused(draw, monkeypatch) -> None:
    monkeypatch.setattr(Drawing, "draw", staticmethod(draw))
    monkeypatch.setattr("re2tal.rewire.escapes.active_count", lambda: 1)
    net = seeded(lambda: Walker(Drawing(), Drawing())).train()
    rewire(net)
    with pytest.raises(RewireError, match="draws from the generator of Python or of NumPy"):
        net(frames())


class ByName(Walker):
    """Hands its state on by name."""

    def forward(self, x):
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x=x)
        return x


@pytest.mark.parametrize("example", [None, (frames(),)])
def test_states_may_be_given_by_name(example) -> None:
    found = []
    for net in (ByName(Block(), Block()), Walker(Block(), Block())):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            for parameter in net.parameters():
                nn.init.normal_(parameter, std=0.3)
        rewire(net.double(), example=example)
        found.append(net(frames()))
    assert torch.equal(*found)
    assert found[0].shape == (2, 16, CHANNELS)


class Creeping(Block):
    """Every call is a little larger than the one before."""

    calls = 0

    def mix(self, x, mask=None):
        self.calls += 1
        return super().mix(x, mask) * (1 + 1e-6 * self.calls)


@residual_branches.register
def _(block: Creeping) -> tuple[Branch, ...]:
    return Branch("mix", Creeping.mix), Branch("mlp", Block.transform)


@pytest.mark.parametrize("options", [{}, {"beta": 0.0}, {"beta": 0.0, "unit": "block"}, {"beta": 0.6}], ids=str)
def test_a_branch_that_moves_a_little_is_an_error_in_the_first_step_of_any_coupling(options) -> None:
    net = seeded(lambda: Walker(Block(), Creeping(), Block())).train()
    rewire(net, config=RewiringConfig(**options))
    with pytest.raises((RewireError, RuntimeError), match=r"gives (something else|another output) when it runs again"):
        net(frames()).sum().backward()


class Padded(nn.Module):
    """Torch's own encoder, which in evaluation mode makes nested tensors of a padding mask."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        return self.encoder(x, src_key_padding_mask=padding)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_refused_with_the_way_to_do_without() -> None:
    x, padding, config = torch.randn(2, 3, 8), torch.tensor([[0, 0, 0], [0, 1, 1]]).bool(), RewiringConfig(unit="block")
    with pytest.raises(ValueError, match=r"the example calls it with nested tensors, .*enable_nested_tensor=False"):
        rewire(Padded(), config=config, example=(x, padding))
    model = Padded()
    rewire(model, config=config, example=(x,))
    model(x, padding).sum().backward()
    with torch.no_grad(), pytest.raises(RewireError, match=r"block encoder\.layers\.0 is called with nested tensors"):
        model.eval()(x, padding)
