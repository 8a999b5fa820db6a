"""Adding to a state and rounding in one go: the bits of rounding first, and an exact inverse."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from re2tal.reversible import coupling
from re2tal.reversible.precision import GRID_STEP, KINKS_STEP, StateFormat


def numbers(dtype: torch.dtype, step: float) -> tuple[Tensor, Tensor]:
    """States on the grid up to the bound of exact sums, and updates up to theirs: at random, near 0, and ties."""
    generator = torch.Generator().manual_seed(0)
    count = 3 * 1000
    states = torch.randint(-(2**23), 2**23, (count,), generator=generator).double() * step
    wide = (torch.rand(1000, generator=generator).double() - 0.5) * 2**23 * step
    near = torch.randn(1000, generator=generator).double() * 4 * step
    ties = (torch.randint(-128, 128, (1000,), generator=generator).double() + 0.5) * step
    states[-1000:-980], ties[:20] = (2**24 - 200) * step, ties[:20].abs()
    return states.float(), torch.cat([wide, near, ties]).to(dtype)


LAYOUTS = {
    "flat": lambda values: values,
    "rows": lambda values: values.view(2, 5, 300),
    "one row": lambda values: values.view(1, 10, 300),
    "channels last": lambda values: values.view(2, 5, 3, 10, 10).to(memory_format=torch.channels_last_3d),
    "part of a state": lambda values: values.view(2, 15, 100).repeat(1, 1, 2).narrow(2, 50, 100),
}


@pytest.mark.parametrize("block", [1, 7, 64, 2**19])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("step", [GRID_STEP, KINKS_STEP])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_and_its_inverse_against_float64(layout, step, dtype, block, monkeypatch) -> None:
    monkeypatch.setitem(coupling.BLOCK_ELEMENTS, "cpu", block)
    precision = StateFormat.of(torch.ones(1), step)
    states, updates = numbers(dtype, step)
    state, update = LAYOUTS[layout](states).clone(memory_format=torch.preserve_format), LAYOUTS[layout](updates)
    before = state.clone()
    # float64 holds both numbers and their sum; `round` takes ties to even.
    wanted = before.double() + (update.double() / step).round() * step
    with torch.no_grad():
        following = precision.add(state, update)
        assert following is state
        assert torch.equal(following.double(), wanted)
        assert torch.equal(following, before + precision.round(update))
        assert torch.equal(precision.add(following, update, sign=-1), before)


def test_the_two_need_not_lie_in_memory_alike() -> None:
    precision, values = StateFormat.of(torch.ones(1), GRID_STEP), torch.randn(4, 6, 5)
    for update in (torch.randn(4, 5, 6).mT, torch.randn(4, 1, 5).expand(4, 6, 5), torch.randn(6, 4, 5).transpose(0, 1)):
        state = precision.state(values)
        with torch.no_grad():
            assert torch.equal(precision.add(state.clone(), update), state + precision.round(update))


def test_what_is_not_finite_stays_so() -> None:
    """A network that diverges shows it in its loss."""
    precision = StateFormat.of(torch.ones(1), GRID_STEP)
    with torch.no_grad():
        found = precision.add(torch.zeros(3), torch.tensor([torch.nan, torch.inf, -torch.inf]))
    assert not found.isfinite().any()


def test_rounding_the_sum_instead_would_have_no_inverse() -> None:
    precision = StateFormat.of(torch.ones(1), 0.5)
    two_states = torch.tensor([0.0, -0.5])
    assert precision.round(two_states + 0.25).unique().numel() == 1
    with torch.no_grad():
        assert precision.add(two_states.clone(), torch.full((2,), 0.25)).unique().numel() == 2


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (1, 1), ()])
def test_small_shapes(shape) -> None:
    with torch.no_grad():
        assert StateFormat.of(torch.ones(1), 0.25).add(torch.zeros(shape), torch.ones(shape)).eq(1).all()
