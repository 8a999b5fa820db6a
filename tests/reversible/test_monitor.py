"""The monitor: what it finds against what happened, when it looks, what it says, and that it changes nothing."""

from __future__ import annotations

import logging
from functools import partial

import pytest
import torch
from reversible.networks import CHANNELS, assert_same_bits, chain, gradients
from reversible.test_chunking import chunked
from reversible.test_precision import autocast
from torch import Tensor

from re2tal.reversible import run_reversibly
from re2tal.reversible.monitor import FirstCheck, Monitor, Reading
from re2tal.reversible.precision import StateFormat

X = torch.randn(16, 32, CHANNELS, generator=torch.Generator().manual_seed(0))  # 4096 elements: all are sampled


def watched(
    branches, x: Tensor = X, *, steps: int = 1, every: int = 1, narrow: bool = True, kind=Monitor, **options
) -> Monitor:
    """The monitor after some steps of training."""
    monitor = kind("layers.2", every=every)
    for _ in range(steps):
        monitor.step()
        run = partial(run_reversibly, branches, monitor=monitor, **options)
        (autocast(run) if narrow else run)(x).square().sum().backward()
    return monitor


def true_drift(branches, **options) -> float:
    """By hooks on the first branch: what it is given in forward and in backward."""
    seen: list[Tensor] = []
    handle = branches[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().double()))
    autocast(partial(run_reversibly, branches, **options))(X).square().sum().backward()
    handle.remove()
    forward, backward = seen
    return float((backward - forward).norm() / forward.norm())


def warnings_of(caplog) -> list[str]:
    return [record.message for record in caplog.records if record.levelno == logging.WARNING]


def test_drift_is_what_the_first_branch_is_off_by_and_is_warned_of_once(caplog) -> None:
    branches = chain("transformer", 48)
    monitor = watched(branches, steps=3, grid=None)
    wanted = true_drift(branches, grid=None)
    assert wanted > 1e-4
    # Places may come twice in a sample, and others not at all.
    assert monitor.reading.drift == pytest.approx(wanted, rel=0.3)
    assert monitor.reading.outside == 0
    (message,) = warnings_of(caplog)
    assert message.startswith("rewired stage layers.2 rebuilds its first state with a relative error of ")
    assert "set grid to 'auto' or a step, or states to 'int32'; or merge more often, by `segment`" in message


@pytest.mark.parametrize("options", [{}, {"states": "int32"}])
def test_exact_states_do_not_drift(caplog, options) -> None:
    assert watched(chain("transformer", 48), **options).reading == Reading(0.0, 0.0)
    assert warnings_of(caplog) == []


def test_float32_drifts_by_roundings_which_nobody_needs_to_know(caplog) -> None:
    monitor = watched(chain("transformer", 48), narrow=False)
    assert 0 < monitor.reading.drift < 1e-5
    assert warnings_of(caplog) == []


def test_kernels_that_do_not_repeat_are_noticed_on_a_grid(caplog) -> None:
    assert watched([restless(0.01)] * 6).reading.drift > 1e-3
    assert "kernels that do not repeat bit for bit" in warnings_of(caplog)[0]


def restless(size: float):
    calls: list[int] = []

    def branch(x: Tensor) -> Tensor:
        calls.append(1)
        return x * size * len(calls)

    return branch


@pytest.mark.parametrize("numbers", [{}, {"narrow": False}, {"narrow": False, "kinks": True}], ids=str)
@pytest.mark.parametrize("size", [1e-3, 1e-4])
def test_in_the_first_step_what_numbers_do_not_explain_is_an_error(numbers, size) -> None:
    options = numbers | {"kind": lambda name, every: FirstCheck(name)}
    with pytest.raises(RuntimeError, match=r"stage layers.2: backward rebuilt a state .* something else when it runs"):
        watched([restless(size)] * 6, **options)
    watched([lambda x: x * size] * 6, **options)


def test_one_element_beyond_the_range_explains_a_drift_which_is_then_a_warning(caplog) -> None:
    first, told = FirstCheck("layers.2"), Monitor("layers.2", every=1)
    first.monitor = told
    x = torch.cat([X, X])  # of which half of the elements are sampled
    x[-1, -1, -1] = 3000.0
    watched([restless(1e-4)] * 6, x, kind=lambda name, every: first)
    assert told.reading.largest >= 3000
    assert "kernels that do not repeat bit for bit" in warnings_of(caplog)[0]


def test_states_beyond_the_range_of_the_grid_are_counted_and_warned_of(caplog) -> None:
    """With a step of 2**-14 it ends at 1024; a fourth of the elements is beyond, from the start."""
    x = X.clone()
    x[:4] = 3000.0
    monitor = watched([lambda x: x * 0.01] * 4, x)
    assert monitor.reading.outside == pytest.approx(0.25, abs=0.03)
    messages = warnings_of(caplog)
    assert any(
        "of its states beyond 1024, up to which its grid of 6.10352e-05 is exact; set grid to" in m for m in messages
    )
    assert watched([lambda x: x * 0.01] * 4, x, grid=2**-10).reading.outside == 0


def test_the_exact_range() -> None:
    ranges = {}
    for states, grid in (("float32", 2**-14), ("float32", None), ("int32", "auto")):
        ranges[states, grid] = StateFormat.of(X, grid, states=states).exact_range
    assert list(ranges.values()) == [1024, None, 2**14]
    assert StateFormat.of(X.double(), 2**-14).exact_range == 2.0**39


@pytest.mark.parametrize("every", [1, 3])
def test_it_looks_after_every_so_many_steps(every, monkeypatch) -> None:
    looks: list[int] = []
    note = Monitor.note
    monkeypatch.setattr(Monitor, "note", lambda self, *args, **kw: looks.append(self._steps) or note(self, *args, **kw))
    watched(chain("mlp", 2), steps=7, every=every)
    assert looks == list(range(every, 8, every))


def test_readings_of_several_runs_are_those_of_the_worst_of_a_step() -> None:
    monitor, precision = Monitor("stage", every=1), StateFormat.of(X, None)
    for step, reading in ((1, Reading(0.5, 0.0)), (2, Reading(1e-6, 0.0)), (2, Reading(1e-7, 0.0))):
        monitor.note(reading, step=step, precision=precision)
    assert monitor.reading == Reading(1e-6, 0.0)


@pytest.mark.parametrize("pieces", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_watching_changes_no_bit_and_no_draw(pieces, dropout) -> None:
    branches = chain("transformer", 6, dropout=dropout)
    each = chunked(branches, 3) if pieces else branches
    monitor = Monitor("stage", every=1)
    monitor.step()
    plain = gradients(autocast(partial(run_reversibly, each)), X, branches)
    assert_same_bits(gradients(autocast(partial(run_reversibly, each, monitor=monitor)), X, branches), plain)
    assert monitor.reading == Reading(0.0, 0.0)


def test_any_memory_format_and_empty_batches() -> None:
    strided = X.reshape(2, 8, 8, 4, CHANNELS).permute(0, 4, 1, 2, 3)
    assert watched([lambda x: x * 0.1] * 3, strided).reading == Reading(0.0, 0.0)
    assert watched([lambda x: x * 0.1] * 3, X[:0].requires_grad_()).reading is None


def test_fake_tensors_are_passed_over() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x = torch.ones(4, CHANNELS, requires_grad=True)
        monitor = Monitor("stage", every=1)
        monitor.step()
        run_reversibly([lambda x: x * 0.1] * 3, x, monitor=monitor).sum().backward()
    assert monitor.reading is None
