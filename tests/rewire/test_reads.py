"""What a trace of a block does not hold: it is an error when it changes, or reason enough to leave the block alone."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rewire.networks import CHANNELS, Block, frames, walker
from torch import Tensor, nn

from re2tal.rewire import RewireError, RewiringConfig, rewire


class Closing(nn.Module):
    """Holds the sum of a block, as BERT's output layers do."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(CHANNELS, CHANNELS)

    def forward(self, x, skip):
        return torch.tanh(self.dense(x)) + skip


class DoublyClosing(Closing):
    def forward(self, x, skip):
        return 2 * super().forward(x, skip) - skip


class Reading(nn.Module):
    """Reads of its modules what its code says, and calls the others."""

    GAIN = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.f, self.drop, self.norm = nn.Linear(CHANNELS, CHANNELS), nn.Dropout(0.0), nn.BatchNorm1d(CHANNELS)
        self.settings, self.shape, self.config = {"gain": 1.0}, (2, -1), SimpleNamespace(gain=1.0)
        self.adapter, self.scale, self.closing = None, None, Closing()

    def forward(self, x, mask=None):
        y = torch.tanh(self.f(x)) * (self.GAIN * self.settings["gain"] * self.config.gain)
        y = F.dropout(y.unflatten(-1, self.shape).flatten(-2), self.drop.p, self.drop.training and self.training)
        y = y if self.adapter is None else self.adapter(y)
        return self.closing(y if self.scale is None else self.scale * y, x)


def hooked(block: nn.Module) -> None:
    block.closing.register_forward_hook(lambda module, args, output: 2 * output)


def with_another_closing(block: nn.Module) -> None:
    block.closing, dense = DoublyClosing().double(), block.closing.dense
    block.closing.dense = dense


CHANGES = {
    "p of a Dropout is 0.5, and was 0.0": lambda block: setattr(block.drop, "p", 0.5),
    "drop of a Reading that was taken apart is in another mode": lambda block: block.drop.eval(),
    "GAIN of a Reading is 2.0, and was 1.0": lambda block: setattr(block, "GAIN", 2.0),
    "settings of a Reading is a dict of other contents": lambda block: block.settings.update(gain=2.0),
    "shape of a Reading is a tuple of other contents": lambda block: setattr(block, "shape", (-1, 2)),
    "config of a Reading is a SimpleNamespace of other": lambda block: setattr(block.config, "gain", 2.0),
    "adapter of a Reading is a Module, and was None": lambda block: setattr(block, "adapter", nn.Identity()),
    "scale of a Reading is a Tensor, and was None": lambda block: setattr(block, "scale", nn.Parameter(torch.ones(1))),
    "closing of a Reading has another type, hooks": hooked,
    "closing of a Reading has another type": with_another_closing,
    "closing of a Reading has .* or another forward": lambda block: setattr(
        block.closing, "forward", lambda x, skip: skip
    ),
}


@pytest.mark.parametrize("reason", CHANGES)
def test_what_a_trace_holds_as_it_was_must_stay_as_it_was(reason) -> None:
    net, x = walker(Reading, Reading), frames()
    rewire(net, example=(x,))
    copy.deepcopy(net)(x)  # a copy holds the same
    CHANGES[reason](net.layers.get_submodule("1"))
    with pytest.raises(ValueError, match=reason):
        net(x)


GAIN, LOG, COUNT = 1.0, [], 0


class Settings:
    gain = 1.0


def squashed(x: Tensor) -> Tensor:
    return torch.tanh(x) * GAIN


class ReadingGlobals(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(CHANNELS, CHANNELS)

    def forward(self, x, mask=None):
        return x + squashed(self.f(x)) * Settings.gain


class Logging(ReadingGlobals):
    def forward(self, x, mask=None):
        LOG.append(len(LOG))
        return super().forward(x)


class CountingCalls(ReadingGlobals):
    def forward(self, x, mask=None):
        global COUNT
        COUNT += 1
        return super().forward(x)


@pytest.mark.parametrize(
    ("place", "value"), [("GAIN", 2.0), ("Settings.gain", 2.0), ("squashed", lambda x: torch.tanh(x))]
)
def test_globals_that_a_trace_read_must_stay_as_they_were(place, value, monkeypatch) -> None:
    net, x = walker(ReadingGlobals, ReadingGlobals), frames()
    rewire(net, example=(x,))
    net(x)
    with monkeypatch.context() as patch:
        patch.setattr(f"{__name__}.{place}", value)
        with pytest.raises(ValueError, match=rf"the global {place} of .*test_reads is .*, and was .* taken apart"):
            net(x)
    net(x)


@pytest.mark.parametrize(("kind", "name"), [(Logging, "LOG"), (CountingCalls, "COUNT")])
def test_blocks_that_write_globals_are_left_alone(kind, name) -> None:
    with pytest.raises(ValueError, match=f"it changes the global {name} of .*, which a graph would not do"):
        rewire(walker(kind, kind), example=(frames(),))


def test_modules_that_a_trace_calls_may_change() -> None:
    net, x = walker(Reading, Reading).eval(), frames()
    plain = copy.deepcopy(net)
    rewire(net, example=(x,), config=RewiringConfig(beta=0.0))
    for one in (net, plain):
        for block in (one.layers.get_submodule(name) for name in ("0", "1")):
            block.f = nn.Sequential(block.f, nn.Tanh())
            block.norm.momentum = 0.5
            block.f[0].register_forward_hook(lambda module, args, output: 2 * output)
    torch.testing.assert_close(net(x), plain(x), rtol=1e-12, atol=1e-12)


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.g, self.norm = (
            nn.Linear(CHANNELS, CHANNELS), nn.Linear(CHANNELS, CHANNELS), nn.BatchNorm1d(CHANNELS)
        )  # fmt: skip
        self.register_buffer("mean", torch.zeros(CHANNELS))
        self.calls, self.generator = 0, torch.Generator()

    def __deepcopy__(self, memo):
        other = type(self)().to(self.mean.dtype)
        other.load_state_dict(self.state_dict())
        return other


class NoGrad(Parts):
    def forward(self, x, mask=None):
        with torch.no_grad():
            gate = torch.sigmoid(self.g(x))
        return x + gate * self.f(x)


class Autocast(Parts):
    def forward(self, x, mask=None):
        with torch.autocast("cpu", enabled=False):
            y = self.f(x)
        return x + y


class Clamping(Parts):
    """Does nothing to small numbers."""

    def forward(self, x, mask=None):
        y = self.f(x)
        y.clamp_(-1e6, 1e6)
        return x + y


class Counting(Parts):
    def forward(self, x, mask=None):
        self.norm(x.flatten(0, 1))
        return x + self.f(x)


class Leaving(Parts):
    def forward(self, x, mask=None):
        y = self.f(x)
        self.loss = y.square().mean()
        return x + y


class Constant(Parts):
    def forward(self, x, mask=None):
        return x + self.f(x) * torch.linspace(0, 1, CHANNELS, dtype=torch.float64)


class OwnGenerator(Parts):
    def forward(self, x, mask=None):
        return x + self.f(x) * torch.rand(1, generator=self.generator, dtype=x.dtype)


class OwnDraws(Parts):
    def forward(self, x, mask=None):
        return x if self.training and torch.rand((), generator=self.generator) < 1e-3 else x + self.f(x)


class NumpyDraws(Parts):
    def forward(self, x, mask=None):
        return x if self.training and np.random.rand() < 1e-3 else x + self.f(x)


class Averaging(Parts):
    def forward(self, x, mask=None):
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean((0, 1))
        return x + self.f(x - self.mean)


LEFT_ALONE = {
    NoGrad: "it switches gradients off",
    Autocast: "it switches autocast on or off",
    Clamping: "it calls clamp_ besides",
    Counting: "it calls norm besides",
    Leaving: "it sets loss of a Leaving",
    Constant: "it uses a tensor that is no argument and that no module holds",
    OwnGenerator: "it uses an object that a graph does not hold",
    OwnDraws: "it draws a random number",
    NumpyDraws: "it draws a random number",
    Averaging: "it sets mean of a Averaging",
}


@pytest.mark.parametrize("kind", LEFT_ALONE)
def test_what_a_trace_would_leave_out_is_a_reason(kind) -> None:
    with pytest.raises(ValueError, match=LEFT_ALONE[kind]):
        rewire(walker(kind), example=(frames(),))


class Cutting(Parts):
    """Cuts its window to the picture, as Swin does, and for good."""

    window = 64

    def forward(self, x, mask=None):
        if self.window > 16:
            self.window = 16
        self.shift = 0
        return x + self.f(x).roll(self.window // 4, 1)


def test_what_a_block_has_set_already_it_may_set_again() -> None:
    net, x = walker(Cutting, Cutting), frames()
    wanted = net(x)
    rewire(net, example=(x,), config=RewiringConfig(beta=0.0))
    torch.testing.assert_close(net(x), wanted, rtol=1e-12, atol=1e-12)


class Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return -0.5 * gradient


class Reversing(Parts):
    def forward(self, x, mask=None):
        x = x + Reversal.apply(self.f(x))
        return x + self.g(Reversal.apply(x))


def test_custom_functions_keep_their_backward() -> None:
    net, x = walker(Reversing, Reversing), frames()
    plain = copy.deepcopy(net)
    (stage,) = rewire(net, example=(x,), config=RewiringConfig(beta=0.0)).stages
    assert stage.branches == ("f + g",)
    for one in (net, plain):
        one(x).square().sum().backward()
    for have, want in zip(net.parameters(), plain.parameters(), strict=True):
        if want.grad is not None:
            torch.testing.assert_close(have.grad, want.grad, rtol=1e-10, atol=1e-10)


class WithObject(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers, self.context = nn.ModuleList([Gained()]).double(), SimpleNamespace(gain=1.0)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x, self.context)
        return x


class Gained(Parts):
    def forward(self, x, context):
        return x + context.gain * self.f(x)


def test_an_object_as_argument_may_change_so_the_block_is_left_alone() -> None:
    with pytest.raises(ValueError, match="it is called with a SimpleNamespace, whose contents may change"):
        rewire(WithObject(), example=(torch.randn(2, 5, CHANNELS).double(),))


class Stepping(Parts):
    def forward(self, x, mask=None):
        self.calls += 1
        return x + self.f(x) * (1.0 if self.calls < 100 else 2.0)


class Listing(Parts):
    def __init__(self) -> None:
        super().__init__()
        self.calls = [0]

    def forward(self, x, mask=None):
        self.calls[0] += 1
        return x + self.f(x) * (1.0 if self.calls[0] < 100 else 2.0)


@pytest.mark.parametrize("kind", [Stepping, Listing])
def test_a_block_that_counts_its_runs_outside_of_buffers_is_refused(kind) -> None:
    with pytest.raises(RewireError, match=rf"layers\.0 \({kind.__name__}\) changes its calls every time it runs"):
        rewire(walker(kind), example=(frames(),), config=RewiringConfig(unit="block"))


class Hasty(nn.Module):
    """Writes into the first state while its blocks have not run."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()]).double()

    def forward(self, x: Tensor) -> Tensor:
        state = 1.0 * x
        y = self.layers[0](state)
        state.mul_(2)
        return self.layers[1](y)


def test_a_first_state_that_is_written_before_its_run_ended_is_an_error() -> None:
    net = Hasty()
    rewire(net)
    with pytest.raises(RewireError, match=r"the state before block layers\.0 was written to in place"):
        net(frames())


def test_cached_parametrizations_are_an_error_in_training() -> None:
    net = walker(Block)
    nn.utils.parametrizations.orthogonal(net.layers[0].mixer)
    rewire(net)
    with nn.utils.parametrize.cached(), pytest.raises(RewireError, match="leave cached"):
        net(frames())


class Changed(Block):
    def transform(self, x, mask=None):
        return 2 * super().transform(x, mask)


def test_a_subclass_with_another_branch_is_not_the_registered_block() -> None:
    with pytest.raises(ValueError, match="Changed changes the transform of Block, so it needs its own registration"):
        rewire(walker(Changed))
    net = walker(Block)
    net.layers[0].transform = lambda x, mask=None: x
    with pytest.raises(ValueError, match="Block changes the transform of Block"):
        rewire(net)


class Noisy(nn.Module):
    """Draws in evaluation too, as a masked autoencoder does."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()]).double()

    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.rand_like(x)
        for layer in self.layers:
            x = layer(x)
        return x


def test_draws_outside_of_blocks_are_the_same_in_both_forms() -> None:
    assert rewire(Noisy(), example=(torch.randn(2, 5, CHANNELS).double(),)).stages[0].rewired_blocks == 2


class Caching(Parts):
    """Keeps a table for evaluation, as LeViT does."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(2 * CHANNELS))
        self.cache: dict[str, Tensor] = {}

    def forward(self, x, mask=None):
        if self.training:
            return x + self.f(x) + self.table[::2]
        if "bias" not in self.cache:
            self.cache["bias"] = self.table[::2]
        return x + self.f(x) + self.cache["bias"]


def test_a_cache_for_evaluation_is_left_as_it_was_and_keeps_no_one_from_training() -> None:
    net = walker(Caching, Caching)
    rewire(net, example=(frames(),), config=RewiringConfig(unit="block"))
    block = net.layers.get_submodule("0")
    assert block.cache == {}
    net(frames()).sum().backward()
    assert block.table.grad is not None
    with pytest.raises(RewireError, match="leaves a tensor behind"):
        net.eval()(frames())


class Scaled(nn.ModuleList):
    """A list that can do more than a list."""

    scale = 2.0

    def walk(self, x: Tensor) -> Tensor:
        for layer in self:
            x = layer(x)
        return x


class Scaling(nn.Module):
    def __init__(self, layers: nn.ModuleList) -> None:
        super().__init__()
        self.layers = layers.double()
        self.layers.shift = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.layers.walk(getattr(self.layers, "scale", 1.0) * x + getattr(self.layers, "shift", 0.0))


@pytest.mark.parametrize("with_example", [True, False])
def test_what_a_container_has_besides_blocks_stays(with_example) -> None:
    net, x = Scaling(Scaled([Block(), Block()])), torch.randn(2, 5, CHANNELS).double()
    wanted = net(x)
    rewire(net, example=(x,) if with_example else None, config=RewiringConfig(beta=0.0))
    torch.testing.assert_close(net(x), wanted, rtol=1e-12, atol=1e-12)


class Running(Scaled):
    def run(self) -> None:
        """A name that a rewired stage has too."""


def test_a_container_with_names_of_a_rewired_stage_is_left_alone() -> None:
    with pytest.raises(ValueError, match="this Running has a run of its own"):
        rewire(Scaling(Running([Block()])))


def test_examples_without_numbers_and_inference_mode_are_refused() -> None:
    with pytest.raises(ValueError, match="the example gives it no numbers"):
        rewire(walker(Parted), example=(frames()[:0],))
    net = walker(Parted)
    with torch.no_grad():
        net.layers[0].f.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="or some that are not finite: look at its weights"):
        rewire(net, example=(frames(),))
    with torch.inference_mode(), pytest.raises(ValueError, match=r"inside torch\.inference_mode"):
        rewire(walker(Parted), example=(frames(),))


class Parted(Parts):
    def forward(self, x, mask=None):
        return x + self.f(x)
