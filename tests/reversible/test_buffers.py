"""Branches that write buffers: statistics are written once, and what is read is found again as forward found it."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from reversible.networks import CHANNELS, states
from reversible.test_chunking import chunked
from torch import Tensor, nn
from torch.nn.utils import spectral_norm as hooked_spectral_norm
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.checkpoint import checkpoint

from re2tal.reversible import run_reversibly
from re2tal.rewire import CheckpointedModule, checkpointed


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(CHANNELS), nn.Linear(CHANNELS, CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(self.norm(x)))


class Spectral(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.linear = spectral_norm(self.linear)


class HookedSpectral(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.linear = hooked_spectral_norm(self.linear)


class Average(Linear):
    """Divides by a moving average that it updates first, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(1, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if self.training:
            self.write(0.5 * self.scale + 0.5 * y.detach().abs().mean())
        return y / self.scale.clone()

    def write(self, value: Tensor) -> None:
        self.scale.copy_(value)


class UncountedAverage(Average):
    """By a way that counts no version."""

    def write(self, value: Tensor) -> None:
        self.scale.data.copy_(value)


class ExchangedAverage(Average):
    def write(self, value: Tensor) -> None:
        self.scale = value


class Normed(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)


class Codebook(Linear):
    """Adds its nearest code, and moves the codes towards what came, as a vector quantiser does."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codes", torch.linspace(-1, 1, 4 * CHANNELS).view(4, CHANNELS).double())

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        flat = y.detach().flatten(0, -2)
        nearest = torch.cdist(flat, self.codes).argmin(dim=1)
        found = self.codes[nearest].view_as(y)
        if self.training:
            self.codes.mul_(0.9).index_add_(0, nearest, flat, alpha=0.1 / len(flat))
        return y * 0.5 + found


class Refilled(Linear):
    """Writes what is there already."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.ones(CHANNELS))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + self.shift.fill_(1.0))


KINDS = (Refilled, Spectral, HookedSpectral, Average, UncountedAverage, ExchangedAverage, Normed, Codebook)


def branches_of(kind: type[nn.Module], number: int = 4) -> nn.ModuleList:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.ModuleList(kind() for _ in range(number)).double()


def coupled(branches, x: Tensor) -> Tensor:
    previous = current = x
    for branch in branches:
        previous, current = current, previous + branch(current)
    return (previous + current) / 2


def trained(forward, branches: nn.ModuleList) -> list[Tensor]:
    """Outputs, gradients and buffers of three steps, the last one of two micro-batches."""
    found = []
    for step in range(3):
        branches.zero_grad()
        outputs = [forward(states(dtype=torch.float64) + step + half) for half in range(1 + step // 2)]
        sum(output.square().sum() for output in outputs).backward()
        found += [*outputs, *(parameter.grad for parameter in branches.parameters())]
        found += [buffer.clone() for buffer in branches.buffers()]
    return [one.detach().clone() for one in found]


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_branch_reads_and_writes_is_replayed(kind, shared) -> None:
    """Against plain autograd; `shared`: one branch runs twice, and reads what the run before wrote."""
    found, wanted = branches_of(kind), branches_of(kind)
    order = [0, 1, 1, 3] if shared else [0, 1, 2, 3]
    of = lambda branches: [branches[number] for number in order]  # noqa: E731
    used = [nn.ModuleList(dict.fromkeys(of(branches))) for branches in (found, wanted)]
    values = trained(lambda x: run_reversibly(of(found), x, owner=found), used[0])
    for have, want in zip(values, trained(lambda x: coupled(of(wanted), x), used[1]), strict=True):
        torch.testing.assert_close(have, want, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("options", [{"saved_branches": 2}, {"grid": None, "saved_outputs": 2}])
@pytest.mark.parametrize("kind", [Spectral, Average])
def test_so_it_is_with_branches_that_save_more(kind, options) -> None:
    found, wanted = branches_of(kind), branches_of(kind)
    values = trained(lambda x: run_reversibly(list(found), x, owner=found, **options), found)
    for have, want in zip(values, trained(lambda x: coupled(wanted, x), wanted), strict=True):
        torch.testing.assert_close(have, want, rtol=1e-9, atol=1e-10)


class Sometimes(Average):
    """Writes from its second training forward on."""

    calls = 0

    def write(self, value: Tensor) -> None:
        self.calls += 1
        if self.calls > 2:
            super().write(value)


def test_writing_that_starts_later_is_an_error() -> None:
    branches = branches_of(Sometimes, 2)
    with pytest.raises(RuntimeError, match=r"a Sometimes wrote its buffers now, but not in its first forward"):
        trained(lambda x: run_reversibly(list(branches), x, owner=branches), branches)


@pytest.mark.parametrize("kind", [Spectral, UncountedAverage])
def test_one_that_each_piece_would_write_is_refused(kind) -> None:
    branches = branches_of(kind, 2)
    with pytest.raises(ValueError, match=r"branch 0 \(cut\) is run in pieces, and each of them writes"):
        run_reversibly(chunked(branches, 3), states(dtype=torch.float64), owner=branches)


class Tabled(Linear):
    """Makes a table when it is needed."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.zeros(0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if not len(self.table):
            self.table = torch.linspace(0, 1, CHANNELS, dtype=x.dtype)
        return super().forward(x) * self.table


def test_a_table_that_the_first_piece_makes_serves_them_all() -> None:
    found, wanted = branches_of(Tabled, 2), branches_of(Tabled, 2)
    for branches, num in ((found, 3), (wanted, 1)):
        run_reversibly(chunked(branches, num), states(dtype=torch.float64), owner=branches).square().sum().backward()
    for one, other in zip(found.parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


class Shifted(Linear):
    """Reads a buffer that nobody writes in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.ones(CHANNELS))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + self.shift)


@pytest.mark.parametrize("change", ["written", "exchanged"])
def test_one_that_is_changed_before_backward_is_an_error(change) -> None:
    branches = branches_of(Shifted, 2)
    loss = run_reversibly(list(branches), states(dtype=torch.float64), owner=branches).sum()
    if change == "written":
        branches[1].shift.mul_(2)
    else:
        branches[1].shift = torch.zeros(CHANNELS)
    with pytest.raises(RuntimeError, match=r"shift of a Shifted, a buffer of .* has changed between forward"):
        loss.backward()


@pytest.mark.parametrize("trained", [True, False])
def test_statistics_may_be_reset_before_backward_where_they_are_not_read(trained) -> None:
    branches = branches_of(Normed, 2).train(trained)
    loss = run_reversibly(list(branches), states(dtype=torch.float64), owner=branches).sum()
    branches[1].norm.reset_running_stats()
    with nullcontext() if trained else pytest.raises(RuntimeError, match="running_mean of a BatchNorm1d, a buffer"):
        loss.backward()


class Stem(CheckpointedModule):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.checkpointing = inner, True

    @checkpointed
    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


@pytest.mark.parametrize("kind", KINDS)
def test_layers_between_runs_are_replayed_too(kind) -> None:
    found, wanted = branches_of(kind, 1), branches_of(kind, 1)
    stem = Stem(found[0])
    values = trained(stem, found)
    for have, want in zip(values, trained(wanted[0], wanted), strict=True):
        torch.testing.assert_close(have, want, rtol=1e-9, atol=1e-10)


def test_plain_checkpointing_would_not_do() -> None:
    """What the tests above would miss if they compared with another replay."""
    found, wanted = branches_of(Average, 1), branches_of(Average, 1)
    values = trained(lambda x: checkpoint(found[0], x, use_reentrant=False), found)
    other = trained(wanted[0], wanted)
    assert not all(torch.allclose(have, want) for have, want in zip(values, other, strict=True))
