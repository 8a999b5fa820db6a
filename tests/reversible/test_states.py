"""States of a run: int32 ones, which are always rebuilt exactly, and how they compare with float32."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from reversible.networks import assert_close, assert_same_bits, chain, gradients, states
from reversible.test_chunking import chunked
from reversible.test_precision import autocast
from torch import Tensor

from re2tal.reversible import run_reversibly
from re2tal.reversible.coupling import Coupling
from re2tal.reversible.precision import FIXED_STEP, StateFormat


class Add(torch.autograd.Function):
    """Integers as the value of a sum, straight through for gradients."""

    @staticmethod
    def forward(ctx, previous: Tensor, update: Tensor, steps: Tensor, step: float) -> Tensor:
        return steps.float() * step

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return gradient, gradient, None, None


def in_fixed_point(branches, x: Tensor, *, step: float) -> Tensor:
    """The rewired network on integers, for plain autograd; "mean" merge."""
    zero = torch.zeros_like(x, dtype=torch.float32)
    count = lambda values: torch.round(values.detach().float() / step).to(torch.int32)  # noqa: E731
    first = count(x)
    start = Add.apply(zero, x.float(), first, step)
    previous = current = (first, start)
    for branch in branches:
        update = branch(current[1]).float()
        steps = previous[0] + count(update)
        previous, current = current, (steps, Add.apply(previous[1], update, steps, step))
    return (previous[1] + current[1]) * 0.5


def seen_by(branches, run: Callable[[], Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """What each branch gets in forward, and in backward turned round."""
    seen: list[Tensor] = []
    handles = [
        branch.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().clone()))
        for branch in branches
    ]
    run().square().sum().backward()
    for handle in handles:
        handle.remove()
    return seen[: len(branches)], seen[: len(branches) - 1 : -1]


@pytest.mark.parametrize("step", [FIXED_STEP, 1e-3])
@pytest.mark.parametrize("length", [1, 2, 3, 8, 48])
@pytest.mark.parametrize("kind", ["transformer", "conv"])
def test_under_bfloat16_gradients_are_the_bits_of_the_network_in_fixed_point(kind, length, step) -> None:
    branches, x = chain(kind, length, dropout=0.2), states()
    run = partial(run_reversibly, branches, states="int32", grid=step, owner=branches)
    wanted = gradients(autocast(partial(in_fixed_point, branches, step=step)), x, branches)
    assert_same_bits(gradients(autocast(run), x, branches), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("merge", ["mean", "extrapolate"])
def test_integers_are_near_the_network_in_real_numbers_and_keep_its_dtypes(merge, dtype) -> None:
    branches, x = chain("transformer", 6).to(dtype), states(dtype=torch.float64).to(dtype)
    run = partial(run_reversibly, branches, merge=merge, owner=branches)
    whole, real = gradients(partial(run, states="int32"), x, branches), gradients(run, x, branches)
    assert {name: value.dtype for name, value in whole.items()} == {name: value.dtype for name, value in real.items()}
    assert_close(whole, real, relative=5e-2 if dtype == torch.bfloat16 else 1e-3)


@pytest.mark.parametrize(("kind", "axis"), [("transformer", 0), ("mlp", 1)])
@pytest.mark.parametrize("stored", [0, 3])
def test_integers_in_pieces_and_with_stored_branches(kind, axis, stored) -> None:
    branches, x = chain(kind, 7), states()
    run = partial(run_reversibly, states="int32", owner=branches)
    whole = gradients(partial(run, branches), x, branches)
    assert_close(
        gradients(partial(run, chunked(branches, 3, axis=axis), saved_branches=stored), x, branches),
        whole,
        relative=1e-5,
    )


def test_sums_of_integers_are_undone_even_where_they_overflow() -> None:
    """2**31 steps of 2**-16 are 32768; the values are nonsense then, but the same nonsense."""
    branches = chain("mlp", 12)
    for branch in branches:
        branch.down.weight.data.mul_(3e4)
    x = states() * 1e4
    forward, backward = seen_by(branches, lambda: run_reversibly(branches, x, states="int32"))
    assert all(torch.equal(one, other) for one, other in zip(forward, backward, strict=True))
    assert max(float(state.abs().max()) for state in forward) > 30_000
    forward, backward = seen_by(branches, lambda: run_reversibly(branches, x, grid=2**-14))
    assert not all(torch.equal(one, other) for one, other in zip(forward, backward, strict=True))


def test_states_are_rebuilt_to_the_last_bit_on_a_grid_and_drift_without_one() -> None:
    branches, x = chain("transformer", 24), states()

    def drift(**options) -> float:
        run = autocast(partial(run_reversibly, branches, owner=branches, **options))
        forward, backward = seen_by(branches, lambda: run(x))
        return float((forward[0].float() - backward[0].float()).norm() / forward[0].float().norm())

    assert drift() == 0
    assert drift(states="int32") == 0
    assert drift(grid=None) > 0


def test_couplings_that_are_no_sums_keep_all_states_of_narrow_numbers_and_use_no_integers() -> None:
    coupling = Coupling(0.1, 0.9)
    assert StateFormat.of(states(), "auto", coupling, states="int32") == StateFormat.of(states(), None, coupling)
    with torch.autocast("cpu", torch.bfloat16):
        assert StateFormat.of(states(), "auto", coupling).room == 0
    branches, x = chain("transformer", 12), states()
    run = partial(run_reversibly, branches, coupling=coupling, owner=branches)
    assert_same_bits(gradients(partial(run, states="int32"), x, branches), gradients(run, x, branches))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"states": "bfloat16"}, r"unknown states 'bfloat16'; known: \['float32', 'int32'\]"),
        ({"states": "int32", "grid": None}, r"int32 states count steps of a grid, and grid is None; give a step"),
        ({"states": "int32", "recompute": False}, "autograd keeps no gradient of int32 states; set recompute"),
        ({"states": "int32", "grid": -1.0}, "grid is -1.0; give a positive step"),
    ],
)
def test_numbers_without_meaning_are_refused(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        run_reversibly(chain("mlp", 2), states(), **options)


def test_integers_without_gradients_need_no_rebuilding() -> None:
    branches, x = chain("mlp", 4), states()
    trained = run_reversibly(branches, x, states="int32")
    with torch.no_grad():
        assert torch.equal(run_reversibly(branches, x, states="int32", recompute=False), trained)
    branches.requires_grad_(False)
    frozen = run_reversibly(branches, x, states="int32", recompute=False, owner=branches)
    assert torch.equal(frozen, trained)
    assert not frozen.requires_grad
