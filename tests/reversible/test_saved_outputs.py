"""Branches that keep what they added change nothing but time and memory: their last linear layer runs once."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import pytest
import torch
from reversible.networks import CHANNELS, Attention, Mlp, assert_close, assert_same_bits, chain, gradients, states
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from re2tal.reversible import run_reversibly
from re2tal.reversible.chunking import ChunkedBranch, Piece, WholeBranch, even_spans
from re2tal.reversible.coupling import Coupling
from re2tal.reversible.live_bytes import LiveBytes
from re2tal.reversible.skip_last_linear import without_last_linear

LENGTH = 6
STATE = 64 * 64 * CHANNELS
LAST = {Attention: "out", Mlp: "down"}


def whole(branch: nn.Module) -> WholeBranch:
    return WholeBranch("branch", branch, getattr(branch, LAST[type(branch)]))


def in_pieces(branch: nn.Module) -> ChunkedBranch:
    cut = lambda state: [Piece(0, (span,), branch) for span in even_spans(len(state), 2)]  # noqa: E731
    return ChunkedBranch("branch", branch, cut, same_draws=False, last=getattr(branch, LAST[type(branch)]))


def results(branches: nn.ModuleList, *, units=whole, dtype: torch.dtype = torch.float32, autocast: bool = False, **run):
    def step(x):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return run_reversibly([units(branch) for branch in branches], x, owner=branches, **run)

    return gradients(step, states(dtype=dtype), branches)


@pytest.mark.parametrize("numbers", [{"grid": 2**-14}, {"autocast": True}, {"states": "int32"}])
@pytest.mark.parametrize("units", [whole, in_pieces])
@pytest.mark.parametrize("known", [1, 2, 99])
def test_values_gradients_and_draws_are_the_same_bits(known, units, numbers) -> None:
    branches = chain("transformer", LENGTH, dropout=0.2)
    wanted = results(branches, units=units, **numbers)
    assert_same_bits(results(branches, units=units, saved_outputs=known, **numbers), wanted)


@pytest.mark.parametrize("options", [{"merge": "extrapolate"}, {"saved_branches": 2}, {"coupling": Coupling(0.5, 0.5)}])
def test_so_it_is_with_every_other_option(options) -> None:
    branches = chain("transformer", LENGTH, dropout=0.2).double()
    wanted = results(branches, dtype=torch.float64, recompute=False, **options)
    assert_close(results(branches, dtype=torch.float64, saved_outputs=3, **options), wanted, relative=1e-12)


@pytest.mark.parametrize("frozen", ["weight", "bias", "no bias"])
def test_a_frozen_layer_gets_no_gradient(frozen) -> None:
    branches = chain("mlp", LENGTH)
    for branch in branches:
        if frozen == "no bias":
            branch.down.bias = None
        else:
            getattr(branch.down, frozen).requires_grad_(False)
    wanted = results(branches, grid=2**-14)
    assert not any(name.endswith(f"down.{frozen}") for name in wanted)
    assert_same_bits(results(branches, grid=2**-14, saved_outputs=99), wanted)


def test_what_is_behind_it_finds_a_tensor_like_the_layers_output() -> None:
    """Dropout may write it in place, and CUDA's draws other units where strides are not those of forward."""
    branches = chain("mlp", LENGTH)
    for branch in branches:
        branch.drop = nn.Dropout(0.2, inplace=True)
    wanted = results(branches, grid=2**-14, recompute=False)
    assert_close(results(branches, grid=2**-14, saved_outputs=99), wanted, relative=1e-6)
    linear, x = nn.Linear(CHANNELS, 3), states()
    with without_last_linear(linear):
        output = linear(x)
    assert (output.shape, output.stride(), output.dtype) == (linear(x).shape, linear(x).stride(), linear(x).dtype)


def flops(known: int, **options) -> int:
    branches = chain("transformer", LENGTH)
    x = torch.ones(64, 64, CHANNELS)
    with FlopCounterMode(display=False) as counter:
        run_reversibly([whole(branch) for branch in branches], x, saved_outputs=known, **options).sum().backward()
    return counter.get_total_flops()


def test_the_most_expensive_layers_are_left_out_first() -> None:
    """Branches 1, 3, 5 are MLPs, whose last layer has twice as many weights as that of attention."""
    attention, mlp = 2 * STATE * CHANNELS, 4 * STATE * CHANNELS
    none, *saved = [flops(known) for known in (0, 1, 2, 3, 4, 5, 99)]
    # Branch 0 is never run to its end again, known or not: nothing is rebuilt from what it added.
    assert [none - one for one in saved] == [mlp, 2 * mlp, 3 * mlp, 3 * mlp + attention] + 2 * [3 * mlp + 2 * attention]


def test_nothing_is_kept_for_states_that_are_not_rebuilt() -> None:
    """With beta 0 all states are kept, so that no branch need be run to its end in backward, and none need be known."""
    assert flops(0, coupling=Coupling(1.0, 0.0)) == flops(99, coupling=Coupling(1.0, 0.0))


@pytest.mark.parametrize(("autocast", "bytes_per_number"), [(False, 4), (True, 2)])
def test_each_costs_what_it_added_in_the_numbers_of_the_branch(autocast, bytes_per_number) -> None:
    branches = chain("transformer", LENGTH)
    kept = []
    for known in range(4):
        with LiveBytes() as live, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = run_reversibly([whole(one) for one in branches], torch.ones(64, 64, CHANNELS), saved_outputs=known)
            kept.append(live.live)
        del output
    assert [more - less for less, more in pairwise(kept)] == 3 * [bytes_per_number * STATE]


@pytest.mark.parametrize("behind", [lambda y: y * y, nn.functional.gelu, lambda y: y.softmax(-1)])
def test_a_layer_that_is_not_the_last_shows_itself(behind) -> None:
    """A gradient that is no number, rather than a wrong one."""
    linear = nn.Linear(CHANNELS, CHANNELS)
    branches = [WholeBranch("wrong", lambda x: behind(linear(x)), linear)] * 3
    run_reversibly(branches, states(), saved_outputs=99, owner=linear).sum().backward()
    assert linear.weight.grad is not None
    assert linear.weight.grad.isnan().any()


def test_a_layer_whose_forward_somebody_changed_is_computed() -> None:
    linear = nn.Linear(2, 2)
    usual = linear.forward
    linear.forward = lambda x: usual(x) + 1
    with without_last_linear(linear):
        assert linear(torch.ones(1, 2)).isfinite().all()
    del linear.forward
    with without_last_linear(linear):
        assert linear(torch.ones(1, 2)).isnan().all()
    assert linear(torch.ones(1, 2)).isfinite().all()


def test_its_gradients_are_those_of_the_layer() -> None:
    linear = nn.Linear(3, 2).double()

    def both(x, weight, bias):
        linear.weight, linear.bias = (nn.Parameter(value.detach()) for value in (weight, bias))
        found = []
        for layer in (None, linear):
            point = x.detach().clone().requires_grad_()
            with without_last_linear(layer):
                output = linear(point)
            found.append(torch.autograd.grad(output, (point, linear.weight, linear.bias), torch.ones_like(output)))
        return found

    draw = partial(torch.randn, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for shape in ((3,), (4, 3), (2, 4, 3), (2, 1, 4, 3)):
        found, wanted = both(draw(*shape), draw(2, 3), draw(2))
        assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


def test_a_negative_number_is_refused() -> None:
    with pytest.raises(ValueError, match="saved_outputs is -1; give a number of branches"):
        run_reversibly(chain("mlp", 2), torch.ones(1, 1, CHANNELS), saved_outputs=-1)
