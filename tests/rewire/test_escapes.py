"""What a block leaves behind beside its output would lose its gradient: refused in the first forward, or exact."""

from __future__ import annotations

import pytest
import torch
from rewire.networks import CHANNELS, Block, Walker, frames, seeded
from torch import nn

from re2tal.rewire import Branch, RewireError, RewiringConfig, residual_branches, rewire


class Routed(Block):
    """Its MLP notes something of what it does in `keep`, and a table that depends on nothing."""

    keep = staticmethod(lambda logits, x, notes: None)

    def __init__(self) -> None:
        super().__init__()
        self.router, self.notes, self.table = nn.Linear(CHANNELS, 2), [], None
        self.register_buffer("count", torch.zeros(()))

    def transform(self, x, mask=None):
        if self.table is None:
            self.table = torch.ones(CHANNELS).to(x) * x.new_ones(1) * torch.zeros_like(x[0, 0]).exp()
        normed = self.norm2(x)
        logits = self.router(normed)
        with torch.no_grad():
            self.seen = logits + 1
            self.count += 1
        self.top = logits.argmax(-1)
        type(self).keep(logits, x, self.notes)
        return self.mlp(normed) * logits.softmax(-1)[..., :1] * self.table


@residual_branches.register
def _(block: Routed) -> tuple[Branch, ...]:
    return Branch("mix", Block.mix), Branch("mlp", Routed.transform)


class Doubled(torch.autograd.Function):
    """Twice its input, which it notes, and one more output."""

    @staticmethod
    def forward(ctx, x):
        return x * 2, x * 3

    @staticmethod
    def backward(ctx, first, second):
        return first * 2 + second * 3


KEPT = {
    "what a custom function returned": lambda logits, x, notes: notes.append(Doubled.apply(logits)[1]),
    "what was mapped": lambda logits, x, notes: notes.append(torch.vmap(lambda row: row.exp())(logits)),
    "what was mapped from inside": lambda logits, x, notes: torch.vmap(lambda row: notes.append(row.exp()) or row)(x),
    "what a reentrant checkpoint returned": lambda logits, x, notes: notes.append(
        torch.utils.checkpoint.checkpoint(torch.exp, logits, use_reentrant=True)
    ),
    "logits": lambda logits, x, notes: notes.append(logits),
    "a view of them": lambda logits, x, notes: notes.append(logits[0]),
    "the input": lambda logits, x, notes: notes.append(x),
    "a cycle": lambda logits, x, notes: notes.append([notes, logits.square().mean()]),
    "what is written into a table": lambda logits, x, notes: notes.append(torch.zeros(logits.shape).copy_(logits)),
}
HARMLESS = {
    "a custom function": lambda logits, x, notes: Doubled.apply(logits),
    "mapped and detached": lambda logits, x, notes: notes.append(torch.vmap(torch.exp)(logits).detach()),
    "a gradient of its own": lambda logits, x, notes: notes.append(
        torch.func.grad(lambda rows: rows.exp().sum())(logits).detach()
    ),
    "nothing": lambda logits, x, notes: None,
    "detached": lambda logits, x, notes: notes.append(logits.detach() * 2),
    "data": lambda logits, x, notes: notes.append(logits.data.mean()),
    "a number": lambda logits, x, notes: notes.append(logits.mean().item()),
}


def routed(keep, monkeypatch) -> Walker:
    monkeypatch.setattr(Routed, "keep", staticmethod(keep))
    return seeded(lambda: Walker(Block(), Routed(), Block())).train()


@pytest.mark.parametrize("unit", ["branch", "block"])
@pytest.mark.parametrize("name", KEPT)
def test_what_would_want_a_gradient_is_refused_in_the_first_forward(name, unit, monkeypatch) -> None:
    net = routed(KEPT[name], monkeypatch)
    rewire(net, config=RewiringConfig(unit=unit))
    with pytest.raises(RewireError, match=r"stage layers \(Routed.*\) leaves a tensor behind \(from .*, of shape \("):
        net(frames())
    with torch.no_grad():
        net(frames())


@pytest.mark.parametrize("name", HARMLESS)
def test_what_wants_none_is_left_alone(name, monkeypatch) -> None:
    gradients = []
    for recompute in (True, False):
        net = routed(HARMLESS[name], monkeypatch)
        rewire(net, config=RewiringConfig(recompute=recompute))
        for _ in range(2):
            net(frames()).square().sum().backward()
        gradients.append([parameter.grad for parameter in net.parameters()])
    # The router has one, through the weights of the MLP; what is left behind adds nothing to it.
    torch.testing.assert_close(*gradients)


def test_without_rebuilding_it_has_its_gradient(monkeypatch) -> None:
    net = routed(KEPT["logits"], monkeypatch)
    rewire(net, config=RewiringConfig(recompute=False))
    net(frames())
    net.layers[1].notes[0].square().sum().backward()
    assert net.layers[1].router.weight.grad.abs().sum() > 0


def test_an_example_finds_what_its_output_does_not_show(monkeypatch) -> None:
    net = routed(KEPT["logits"], monkeypatch)
    with pytest.raises(RewireError, match=r"\(Routed mlp\) leaves a tensor behind \(from linear"):
        rewire(net, example=(frames(),))
    assert type(net.layers) is nn.ModuleList


def test_a_hook_that_collects_later_is_found(monkeypatch) -> None:
    net, collected = routed(HARMLESS["nothing"], monkeypatch), []
    rewire(net)
    net(frames()).sum().backward()
    asked = False
    net.layers[0].mixer.register_forward_hook(lambda *args: collected.append(args[-1]) if asked else None)
    net(frames()).sum().backward()
    asked = True
    with pytest.raises(RewireError, match=r"\(Block mix\) leaves a tensor behind \(from linear"):
        net(frames())


class Forced(Block):
    """Its MLP is the gradient of an energy, found inside."""

    how = "autograd"

    def transform(self, x, mask=None):
        def energy(x):
            return self.mlp(self.norm2(x)).square().sum()

        if type(self).how == "func":
            return torch.func.grad(energy)(x)
        with torch.enable_grad():
            x = x if x.requires_grad else x.detach().requires_grad_()
            return torch.autograd.grad(energy(x), x, create_graph=True)[0]


@residual_branches.register
def _(block: Forced) -> tuple[Branch, ...]:
    return Branch("mix", Block.mix), Branch("forces", Forced.transform)


@pytest.mark.parametrize("how", ["autograd", "func"])
def test_a_branch_may_differentiate_something_itself(how, monkeypatch, caplog) -> None:
    monkeypatch.setattr(Forced, "how", how)
    found = []
    for recompute in (True, False):
        net = seeded(lambda: Walker(Block(), Forced(), Block())).train()
        rewire(net, config=RewiringConfig(recompute=recompute))
        output = net(frames())
        output.square().sum().backward()
        found.append([output, *(parameter.grad for parameter in net.parameters())])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-11)
    said = "(Forced forces) could not be checked for tensors that it leaves behind" in caplog.text
    assert said == (how == "autograd")


def test_watching_changes_no_bit(monkeypatch) -> None:
    net = routed(HARMLESS["nothing"], monkeypatch).float()
    rewire(net)
    first = net(frames().float())
    first.sum().backward()
    gradients = [parameter.grad.clone() for parameter in net.parameters()]
    net.zero_grad()
    second = net(frames().float())
    second.sum().backward()
    assert torch.equal(first, second)
    assert all(torch.equal(one.grad, other) for one, other in zip(net.parameters(), gradients, strict=True))


@pytest.mark.parametrize("segment", [None, 2])
def test_a_buffer_that_a_later_run_writes_is_no_buffer_that_is_only_read(segment, monkeypatch) -> None:
    net = routed(HARMLESS["nothing"], monkeypatch)
    rewire(net, config=RewiringConfig(segment=segment), example=(frames(),))
    for step in range(1, 3):
        net(frames()).sum().backward()
        assert net.layers[1].count == step


class Attending(Block):
    """Its mixer is one call of a fused attention kernel."""

    def mix(self, x, mask=None):
        x = self.norm1(x)[:, None]
        return nn.functional.scaled_dot_product_attention(x, x, x)[:, 0]


@residual_branches.register
def _(block: Attending) -> tuple[Branch, ...]:
    return Branch("mix", Attending.mix), Branch("mlp", Block.transform)


def test_attention_that_the_run_itself_saves_is_not_left_behind() -> None:
    def gradient(**options) -> torch.Tensor:
        net = seeded(lambda: Walker(Attending(), Attending())).train()
        rewire(net, config=RewiringConfig(**options))
        net(frames()).square().sum().backward()
        return net.layers[0].norm1.weight.grad

    torch.testing.assert_close(gradient(saved_attention=2), gradient(recompute=False))
