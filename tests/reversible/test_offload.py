"""States in host memory: the same gradients to the last bit, and nothing of a run on the device in between."""

from __future__ import annotations

import gc
import weakref
from functools import partial

import pytest
import torch
from reversible.networks import CHANNELS, chain
from torch import Tensor, nn

from re2tal.reversible import offload, run_reversibly
from re2tal.reversible.offload import offloaded

LENGTHS = (4, 1, 3, 2)  # of the runs of the network; a run of one keeps its input


class Net(nn.Module):
    """Runs with an ordinary layer behind each."""

    def __init__(self, *, offloads: bool, kind: str = "transformer", dropout: float = 0.1) -> None:
        super().__init__()
        self.offloads = offloads
        self.runs = nn.ModuleList(chain(kind, length, dropout=dropout, seed=length) for length in LENGTHS)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.between = nn.ModuleList(nn.Linear(CHANNELS, CHANNELS) for _ in LENGTHS)

    def forward(self, x: Tensor) -> Tensor:
        for run, between in zip(self.runs, self.between, strict=True):
            if self.offloads:
                with offloaded(x):
                    x = run_reversibly(run, x, owner=run)
            else:
                x = run_reversibly(run, x, owner=run)
            x = between(x)
        return x


def sample(seed: int) -> Tensor:
    return torch.randn(2, 5, CHANNELS, generator=torch.Generator().manual_seed(seed))


def gradients(net: nn.Module) -> list[Tensor]:
    return [parameter.grad for parameter in net.parameters()]


def trained(device: str, *, offloads: bool, precision: torch.dtype) -> list[Tensor]:
    net = Net(offloads=offloads).to(device)
    torch.manual_seed(3)
    x = sample(0).to(device).requires_grad_()
    with torch.autocast(device, precision, enabled=precision != torch.float32):
        net(x).float().square().sum().backward()
    return [x.grad, *gradients(net)]


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_no_gradient_changes_by_a_bit(device, precision) -> None:
    found, wanted = (trained(device, offloads=offloads, precision=precision) for offloads in (True, False))
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


def test_several_forwards_before_their_backwards_and_gradients_that_add_up() -> None:
    """As with accumulation, with two views of one clip, and with losses that are added."""
    results = []
    for offloads in (True, False):
        net = Net(offloads=offloads, dropout=0.0)
        first, second = net(sample(1)), net(sample(2))
        first.sum().backward()
        second.square().sum().backward()
        (net(sample(3)).sum() + net(sample(4)).square().sum()).backward()
        results.append(gradients(net))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.fixture
def traffic(monkeypatch) -> list[tuple[str, Tensor]]:
    """("send", state on the device) and ("bring", state on the host), in their order."""
    seen: list[tuple[str, Tensor]] = []

    class Watched(offload._Lane):
        def send(self, state, *, wait):
            seen.append(("send", weakref.ref(state.untyped_storage())))
            seen.append(("host", host := super().send(state, wait=wait)))
            return host

        def bring(self, host):
            seen.append(("bring", host))
            return super().bring(host)

    offload._lane.cache_clear()
    monkeypatch.setattr(offload, "_Lane", Watched)
    yield seen
    offload._lane.cache_clear()


def test_between_forward_and_backward_no_state_is_on_the_device(traffic) -> None:
    output = Net(offloads=True)(sample(0))
    gc.collect()
    sent = [what for name, what in traffic if name == "send"]
    assert len(sent) == sum(min(2, length) for length in LENGTHS)
    assert all(storage() is None for storage in sent)
    del output


def test_states_set_out_one_run_ahead_and_each_once(traffic) -> None:
    net, order = Net(offloads=True), []
    for between in net.between:
        between.weight.register_hook(lambda _: order.append(len(brought())))
    hosts = lambda: [what for name, what in traffic if name == "host"]  # noqa: E731
    brought = lambda: [what for name, what in traffic if name == "bring"]  # noqa: E731
    net(sample(0)).sum().backward()
    first, second, third, fourth = (slice(0, 2), slice(2, 3), slice(3, 5), slice(5, 7))
    wanted = [host for run in (fourth, third, second, first) for host in hosts()[run]]
    assert [host.data_ptr() for host in brought()] == [host.data_ptr() for host in wanted]
    # What had set out when the layer behind each run was differentiated, that is just before the run.
    assert order == [0, 4, 5, 7]


def test_host_memory_goes_with_the_graph(traffic) -> None:
    net = Net(offloads=True)
    output = net(sample(0))
    hosts = [weakref.ref(what.untyped_storage()) for name, what in traffic if name == "host"]
    traffic.clear()
    assert all(host() is not None for host in hosts)
    output.sum().backward()
    gc.collect()
    traffic.clear()
    assert all(host() is None for host in hosts)
    output = net(sample(0))
    hosts = [weakref.ref(what.untyped_storage()) for name, what in traffic if name == "host"]
    traffic.clear()
    del output
    gc.collect()
    assert all(host() is None for host in hosts)


def test_what_is_kept_may_be_asked_for_again() -> None:
    run, x = chain("mlp", 2), sample(0)
    with offloaded(x):
        output = run_reversibly(run, x, owner=run)
    first, second = output.grad_fn.saved_tensors, output.grad_fn.saved_tensors
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    assert all(one.data_ptr() != other.data_ptr() for one, other in zip(first, second, strict=True))


@pytest.mark.gpu
def test_an_input_that_is_edited_after_the_run_keeps_its_copy() -> None:
    """A run of one keeps its input, which is not its own: the copy must be complete before the edit."""
    branch = nn.Linear(1024, 1024, device="cuda")
    results = []
    for offloads in (True, False):
        x = torch.ones(2**14, 1024, device="cuda")
        if offloads:
            with offloaded(x):
                output = run_reversibly([branch], x)
            x.zero_()
        else:
            output = run_reversibly([branch], x)
        branch.zero_grad()
        output.sum().backward()
        results.append(branch.weight.grad.clone())
    assert torch.equal(*results)


@pytest.mark.gpu
def test_the_device_holds_two_runs_at_most() -> None:
    """Peak of forward and backward over many runs of few small branches, in states: it does not grow with the runs."""
    peaks = []
    for num_runs in (4, 16):
        scale = nn.Parameter(torch.ones((), device="cuda"))
        x = torch.ones(2**22, device="cuda", requires_grad=True)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before, y = torch.cuda.memory_allocated(), x
        for _ in range(num_runs):
            with offloaded(y):
                y = run_reversibly([partial(torch.mul, scale)] * 2, y)
            torch.cuda.synchronize()  # so that copies, not a queue of work, set the peak
        y.sum().backward()
        peaks.append((torch.cuda.max_memory_allocated() - before) / (4 * 2**22))
    assert peaks[1] <= peaks[0] + 0.5
