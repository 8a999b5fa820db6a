"""Blocks that nobody registered, taken apart by what they do: what is found, and what is refused with which reason."""

from __future__ import annotations

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from rewire.networks import CHANNELS, PostNorm, frames, walker
from torch import Tensor, nn

from re2tal.rewire import RewiringConfig, rewire
from re2tal.rewire.branches import NotResidual, Residual
from re2tal.rewire.discover import BlockInputs, take_apart


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(CHANNELS), nn.LayerNorm(CHANNELS)
        self.f, self.g = nn.Linear(CHANNELS, CHANNELS), nn.Linear(CHANNELS, CHANNELS)


class PreNorm(Parts):
    def forward(self, x, mask=None):
        skip = x
        x = self.f(self.norm1(x))
        if mask is not None:
            x = x * mask[..., None]
        x = skip + x
        return self.g(self.norm2(x)) + x


class Parallel(Parts):
    def forward(self, x, mask=None):
        return x + self.f(self.norm1(x)) + self.g(self.norm2(x))


class Augmented(Parts):
    """Sums by += and .add, after a question for the shape."""

    def forward(self, x, mask=None):
        batch, tokens, channels = x.shape
        y = self.f(self.norm1(x).view(batch * tokens, channels)).view(batch, tokens, channels)
        y += x
        return y.add(self.g(self.norm2(y).reshape(x.size(0), -1, channels)))


class Scaled(Parts):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((CHANNELS,), 0.3))
        self.register_buffer("table", torch.linspace(0, 1, CHANNELS))

    def forward(self, x, mask=None):
        x = x + self.scale * self.f(x)
        return x + self.g(x + self.table)


class Tuples(Parts):
    def forward(self, x, mask=None):
        outputs = (self.f(self.norm1(x)), None)
        return (x + outputs[0],) + outputs[1:]  # noqa: RUF005


class ByMode(Parts):
    """Dropout that is no module: torch.fx writes the mode down as a constant."""

    def forward(self, x, mask=None):
        return x + F.dropout(self.f(self.norm1(x)), 0.5, training=self.training)


class Closing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(CHANNELS, CHANNELS)

    def forward(self, x, skip):
        return self.dense(x) + skip


class SumInside(nn.Module):
    """The second sum is taken inside a module, as VideoMAE's."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(CHANNELS), nn.LayerNorm(CHANNELS)
        self.f, self.output = nn.Linear(CHANNELS, CHANNELS), Closing()

    def forward(self, x, mask=None):
        x = self.f(self.norm1(x)) + x
        return self.output(self.norm2(x), x)


class InPieces(Parts):
    """The first token waits while something is added to the others, as TimeSformer's class token does."""

    def forward(self, x, mask=None):
        first, rest = x[:, 0].unsqueeze(1), x[:, 1:] + self.f(self.norm1(x[:, 1:]))
        update = self.g(self.norm2(torch.cat((first + rest.mean(dim=1, keepdim=True), rest), 1)))
        return torch.cat((first, rest), dim=1) + update


class EndsInPieces(Parts):
    def forward(self, x, mask=None):
        x = x + self.f(self.norm1(x))
        return torch.cat([x[:, :2] + self.g(self.norm2(x[:, :2])), x[:, 2:]], dim=1)


RESIDUAL = {
    PreNorm: ("norm1 > f", "norm2 > g"),
    Parallel: ("norm1 > f > norm2 > g",),
    Augmented: ("norm1 > f", "norm2 > g"),
    Scaled: ("f", "g"),
    Tuples: ("norm1 > f",),
    ByMode: ("norm1 > f",),
    InPieces: ("norm1 > f", "norm2 > g"),
    EndsInPieces: ("norm1 > f", "norm2 > g"),
    SumInside: ("norm1 > f", "norm2 > output.dense"),
}


@pytest.mark.parametrize("kind", RESIDUAL)
def test_branches_are_found_and_named_by_the_modules_they_call(kind) -> None:
    (stage,) = rewire(walker(kind, kind), example=(frames(),)).stages
    assert stage.rewired_blocks == 2
    assert stage.branches == (" + ".join(RESIDUAL[kind]),)


@pytest.mark.parametrize("kind", RESIDUAL)
def test_segments_of_one_whole_block_and_its_branches_are_the_network(kind) -> None:
    """Extrapolated runs of one block, and of one block's two branches, change nothing."""
    net, x = walker(kind, kind, kind).eval(), frames(batch=3, tokens=5)
    wanted = net(x)
    rewire(net, example=(frames(),), config=RewiringConfig(merge="extrapolate", segment=len(RESIDUAL[kind])))
    torch.testing.assert_close(net(x), wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", RESIDUAL)
def test_gradients_of_what_was_found_match_plain_autograd(kind) -> None:
    found = []
    for recompute in (True, False):
        net = walker(kind, kind, kind)
        rewire(net, example=(frames(),), config=RewiringConfig(recompute=recompute))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            net(frames()).square().sum().backward()
        found.append([parameter.grad for parameter in net.parameters() if parameter.grad is not None])
    for forgotten, kept in zip(*found, strict=True):
        torch.testing.assert_close(forgotten, kept, rtol=1e-10, atol=1e-10)


def test_dropout_that_is_no_module_follows_the_mode() -> None:
    net, x = walker(ByMode), frames()
    rewire(net, example=(x,))
    assert not torch.equal(net(x), net(x))
    net.eval()
    assert torch.equal(net(x), net(x))


def test_masks_are_inputs_not_constants() -> None:
    net, x = walker(PreNorm, PreNorm), frames()
    masks = [(torch.arange(16) < length).double().expand(2, 16) for length in (16, 5)]
    wanted = [net(x, mask) for mask in masks]
    rewire(net, example=(x, masks[0]), config=RewiringConfig(merge="extrapolate", segment=2))
    for mask, want in zip(masks, wanted, strict=True):
        torch.testing.assert_close(net(x, mask), want, rtol=1e-10, atol=1e-10)
    with pytest.raises(ValueError, match=r"PreNorm was taken apart when called with \(a tensor\) .* with \(None\)"):
        net(x)


def test_parameters_of_the_block_itself_are_used_inside_a_call_of_the_block() -> None:
    found = take_apart(Scaled(), BlockInputs(torch.ones(2, 3, CHANNELS), (), {}))
    assert isinstance(found, Residual)
    assert [branch.through_block for branch in found.branches] == [True, False]


def test_a_copy_of_what_was_found_uses_its_own_parameters() -> None:
    net, x = walker(PreNorm), frames()
    rewire(net, example=(x,))
    other, wanted = copy.deepcopy(net), net(x)
    with torch.no_grad():
        net.layers.get_submodule("0").f.weight.zero_()
    assert torch.equal(other(x), wanted)
    assert not torch.equal(net(x), wanted)


def test_looking_leaves_modes_statistics_and_generators_alone() -> None:
    block = nn.Sequential(nn.BatchNorm1d(CHANNELS), nn.Dropout(0.5))

    class Conv(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = block

        def forward(self, x, mask=None):
            return x + self.f(x.transpose(1, 2)).transpose(1, 2)

    net = walker(Conv, PostNormMasked)
    net.layers[1].eval()
    modes = [module.training for module in net.modules()]
    buffers, state = [buffer.clone() for buffer in net.buffers()], torch.get_rng_state()
    rewire(net, example=(frames(),))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(buffer, was) for buffer, was in zip(net.buffers(), buffers, strict=True))
    assert [module.training for module in net.modules()] == modes


class Relu(Parts):
    def forward(self, x):
        return torch.relu(x + self.f(x))


class Halving(Parts):
    def forward(self, x):
        return x[:, ::2] + self.f(x)[:, ::2]


class Weighted(Parts):
    def forward(self, x):
        return 2 * x + self.f(x)


class Branching(Parts):
    def forward(self, x):
        return x + self.f(x) if x.mean() > 0 else x


class Talkative(Parts):
    def forward(self, x):
        y = self.f(x)
        return x + y, y


class Writing(Parts):
    def forward(self, x):
        y = self.f(F.relu_(x))
        return x + y


class Nothing(Parts):
    def forward(self, x):
        return x


class Swapped(Parts):
    """Its pieces are put together in another order."""

    def forward(self, x):
        return torch.cat((x[:, 1:] + self.f(x[:, 1:]), x[:, :1]), dim=1)


class Remembering(Parts):
    """What is added to a piece depends on a state before the last."""

    def forward(self, x):
        y = x + self.f(x)
        return torch.cat((y[:, :1], y[:, 1:] + self.g(x[:, 1:])), dim=1)


class Moody(Parts):
    def forward(self, x):
        x = x + self.f(x)
        return x + self.g(x) if self.training else x


class Lasting(Parts):
    """Traces well, but the trace does not do what the block does the next time."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return x + self.f(x) * self.calls


REFUSED = {
    PostNorm: "it comes from its module 'norm'",
    Relu: r"it comes from relu\(\)",
    Halving: r"it changes width or resolution \(downsampling\): it turns \(2, 6, \d+\) into \(2, 3, \d+\)",
    Weighted: "it comes from a sum, of which no term stands for the state before it",
    Branching: "its forward cannot be traced: TraceError",
    Talkative: "it returns more than its hidden state",
    Writing: "it writes into its input",
    Nothing: "it returns its input",
    Swapped: "the branches found miss its result by",
    Remembering: "what it adds to a slice of a state depends on more than that state",
    Moody: "it adds other branches in training than in evaluation",
    Lasting: "it sets calls of a Lasting, which a graph would not do",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_chain_of_sums_is_refused_with_the_reason(kind) -> None:
    x = torch.randn(2, 6, CHANNELS, generator=torch.Generator().manual_seed(0))
    found = take_apart(kind(), BlockInputs(x, (), {}))
    assert isinstance(found, NotResidual)
    assert re.search(REFUSED[kind], found.reason), found.reason


class Damped(Parts):
    scale = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.scale = 0.25

    def forward(self, x):
        return x + self.f(x) * self.scale


class LayerDrop(Parts):
    def forward(self, x):
        if self.training and torch.rand(()).item() < 0.3:
            return x
        return x + self.f(x)


def test_a_number_that_is_changed_later_is_an_error() -> None:
    block = Damped()
    x = torch.randn(2, 6, CHANNELS)
    found = take_apart(block, BlockInputs(x, (), {}))
    assert isinstance(found, Residual)
    (branch,) = found.branches
    torch.testing.assert_close(x + branch.function(block, x), block(x))
    block.scale = 0.5
    with pytest.raises(ValueError, match=r"scale of a Damped is 0\.5, and was 0\.25 when it was taken apart; unrewire"):
        branch.function(block, x)


@pytest.mark.parametrize("seed", range(8))
def test_a_block_that_draws_whether_it_runs_is_refused_whatever_the_draw(seed) -> None:
    torch.manual_seed(seed)
    found = take_apart(LayerDrop(), BlockInputs(torch.randn(2, 6, CHANNELS), (), {}))
    assert isinstance(found, NotResidual)
    assert "it draws a random number to decide what it computes" in found.reason


def test_reasons_stand_in_the_report() -> None:
    (stage,) = rewire(walker(PreNorm, PostNormMasked, PreNorm), example=(frames(),)).stages
    assert stage.rewired_blocks == 2
    assert stage.left_alone == (
        "1: its result is not its input and something added to it: it comes from its module 'norm', "
        "a norm after the sum (post-norm); as a whole, RewiringConfig(unit='block'), it can be rewired",
    )


class PostNormMasked(PostNorm):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x)


def test_blocks_that_the_example_does_not_reach() -> None:
    net = walker(PreNorm, PreNorm)
    net.unused = nn.ModuleList([PreNorm(), PreNorm()])
    reports = {stage.name: stage for stage in rewire(net, example=(frames(),)).stages}
    assert reports["layers"].rewired_blocks == 2
    assert reports["unused"].left_alone == ("0, 1: the example did not call it with a tensor as its first argument",)


def test_without_an_example_unregistered_blocks_are_left_alone() -> None:
    with pytest.raises(ValueError, match="0, 1: nothing is registered for PreNorm"):
        rewire(walker(PreNorm, PreNorm))
