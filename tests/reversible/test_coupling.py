"""Couplings between the network before it was rewired and Re2TAL's: values, gradients, what they keep, their errors."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from math import inf

import pytest
import torch
from reversible.networks import CHANNELS, KINDS, assert_close, assert_same_bits, chain, coupled, gradients, states
from reversible.test_chunking import chunked
from torch import Tensor

from re2tal.reversible import run_reversibly
from re2tal.reversible.coupling import SUM, Coupling

MERGES = ("mean", "extrapolate")
WAY = [(1, 0), (0.9, 0.1), (0.5, 0.5), (0.25, 0.75), (0.02, 0.98), (0, 1)]
ELSEWHERE = [(1, 0.5), (0.25, 0.25), (0, 0.75), (0.5, 0), (0.5, 1)]


def saved_states(run, x: Tensor) -> int:
    """How many tensors of the size of `x` autograd is given to keep."""
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        output = run(x)
    assert output.requires_grad
    return sum(tensor.shape == x.shape for tensor in saved)


@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize("length", [1, 2, 3, 8, 20])
@pytest.mark.parametrize(("alpha", "beta"), WAY + ELSEWHERE)
def test_gradients_are_those_of_the_recurrence_under_plain_autograd(alpha, beta, length, merge) -> None:
    branches, x = chain("transformer", length, dropout=0.2).double(), states(dtype=torch.float64)
    wanted = gradients(partial(coupled, branches, merge=merge, alpha=alpha, beta=beta), x, branches)
    for recompute in (True, False):
        run = partial(
            run_reversibly, branches, merge=merge, coupling=Coupling(alpha, beta), recompute=recompute, owner=branches
        )
        assert_close(gradients(run, x, branches), wanted, relative=1e-11)


@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize(("kind", "num", "axis"), [("transformer", 2, 0), ("mlp", 3, 1)])
@pytest.mark.parametrize(("alpha", "beta"), [*WAY, (1, 0.5)])
def test_pieces_give_what_whole_branches_give(alpha, beta, kind, num, axis, merge) -> None:
    branches, x = chain(kind, 9).double(), states(dtype=torch.float64)
    wanted = gradients(partial(coupled, branches, merge=merge, alpha=alpha, beta=beta), x, branches)
    cut, options = chunked(branches, num, axis=axis), {"merge": merge, "coupling": Coupling(alpha, beta)}
    for recompute in (True, False):
        run = partial(run_reversibly, cut, recompute=recompute, owner=branches, **options)
        assert_close(gradients(run, x, branches), wanted, relative=1e-11)


@pytest.mark.parametrize("stored", [1, 4, 8])
@pytest.mark.parametrize(("alpha", "beta"), WAY)
def test_behind_rebuilt_branches_others_may_keep_their_activations(alpha, beta, stored) -> None:
    branches, x = chain("transformer", 9).double(), states(dtype=torch.float64)
    wanted = gradients(partial(coupled, branches, alpha=alpha, beta=beta), x, branches)
    run = partial(run_reversibly, branches, coupling=Coupling(alpha, beta), saved_branches=stored, owner=branches)
    assert_close(gradients(run, x, branches), wanted, relative=1e-11)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("alpha", "beta"), WAY)
def test_float32_stays_within_the_contract_wherever_it_inverts(alpha, beta, kind) -> None:
    branches, x = chain(kind, 12), states()
    run = partial(run_reversibly, branches, coupling=Coupling(alpha, beta), owner=branches)
    assert_close(gradients(run, x, branches), gradients(partial(run, recompute=False), x, branches), relative=1e-5)


def test_values_do_not_depend_on_recompute_to_the_last_bit() -> None:
    branches, x = chain("transformer", 6), states()
    for run in (partial(run_reversibly, branches, x, coupling=Coupling(0.3, 0.7), merge=merge) for merge in MERGES):
        unwatched = torch.no_grad()(run)()
        assert torch.equal(run(recompute=True), unwatched)
        assert torch.equal(run(recompute=False), unwatched)


@pytest.mark.parametrize("merge", MERGES)
def test_the_start_of_the_way_is_the_plain_network_to_the_last_bit(merge) -> None:
    branches, x = chain("transformer", 7), states()

    def plain(x: Tensor) -> Tensor:
        for branch in branches:
            x = x + branch(x)
        return x

    run = partial(run_reversibly, branches, merge=merge, coupling=Coupling(1, 0), owner=branches)
    found, wanted = gradients(run, x, branches), gradients(plain, x, branches)
    assert torch.equal(found["output"], wanted["output"])
    assert_close(found, wanted, relative=1e-6)


@pytest.mark.parametrize("merge", MERGES)
def test_the_end_of_the_way_is_the_coupling_of_the_paper_to_the_last_bit(merge) -> None:
    branches, x = chain("transformer", 7, dropout=0.2), states()
    way, paper = (
        gradients(partial(run_reversibly, branches, merge=merge, owner=branches, **options), x, branches)
        for options in ({"coupling": Coupling(0.0, 1.0)}, {})
    )
    assert_same_bits(way, paper)


@pytest.mark.parametrize("merge", MERGES)
def test_outputs_move_smoothly_along_the_way(merge) -> None:
    """Twice the steps, half the largest jump: no value of beta is a cliff, the switch to inversion included."""
    branches, x = chain("transformer", 8).double(), states(dtype=torch.float64)

    def largest_jump(num: int) -> float:
        outputs = [
            run_reversibly(branches, x, merge=merge, coupling=Coupling(1 - index / num, index / num))
            for index in range(num + 1)
        ]
        return max(float((b - a).detach().norm()) for a, b in pairwise(outputs))

    assert largest_jump(100) < 0.6 * largest_jump(50)


@pytest.mark.parametrize("beta", [0, 0.25, 0.5, 0.75, 1])
def test_extrapolating_has_every_branch_in_full_measure_and_the_mean_one_part_in_one_plus_beta(beta) -> None:
    """Branches that do not look at their input tell how much of each arrives."""
    constants = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = torch.ones(4, dtype=torch.float64)
    branches = [lambda state, constant=constant: state * 0 + constant for constant in constants]
    run = partial(run_reversibly, branches, x, coupling=Coupling(1 - beta, beta))
    torch.testing.assert_close(run(merge="extrapolate"), x + constants.sum(0))
    torch.testing.assert_close(run(merge="mean"), x + constants.sum(0) / (1 + beta))


@pytest.mark.parametrize(
    ("beta", "wanted"),
    [
        (0.0, list(range(12))),
        (0.1, list(range(12))),  # one step would multiply an error by 10
        (0.2, [0, 2, 3, 5, 6, 8, 9, 11, 12]),  # 5: one rebuilt state between two pairs
        (0.4, [0, 3, 4, 7, 8, 11, 12]),  # 2.5**2 = 6.25: two
        (0.5, [1, 2, 6, 7, 11, 12]),  # 2**3 = 8, the limit itself: three
        (0.75, [2, 3, 11, 12]),  # (4 / 3)**7 = 7.5: seven
        (0.9, [11, 12]),  # (10 / 9)**11 = 3.2
        (1.0, [11, 12]),
    ],
)
def test_states_are_kept_at_the_distance_at_which_errors_have_grown_by_the_limit(beta, wanted) -> None:
    coupling = Coupling(1 - beta, beta)
    room = 2**3
    assert coupling.saved_states(12, room=room) == wanted
    branches, x = chain("mlp", 12), states()
    assert saved_states(partial(run_reversibly, branches, coupling=coupling), x) == len(wanted)
    in_a_row, longest = 0, 0
    for index in reversed(range(12)):
        in_a_row = 0 if index in wanted else in_a_row + 1
        longest = max(longest, in_a_row)
    assert longest == 0 or coupling.error_growth**longest <= room * (1 + 1e-9)


@pytest.mark.parametrize("length", [1, 2, 3, 4])
@pytest.mark.parametrize("beta", [0.0, 0.2, 0.9, 1.0])
def test_short_runs_keep_no_more_than_a_state_per_branch(beta, length) -> None:
    kept = Coupling(1 - beta, beta).saved_states(length, room=8)
    assert length - 1 in kept
    assert len(kept) <= length


def test_where_branches_compute_in_bfloat16_only_the_end_of_the_way_is_rebuilt() -> None:
    branches, x = chain("transformer", 12), states()

    def run(x: Tensor, *, beta: float, recompute: bool = True) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return run_reversibly(branches, x, coupling=Coupling(1 - beta, beta), recompute=recompute, owner=branches)

    for beta, num in ((0.0, 12), (0.5, 12), (0.99, 12), (1.0, 2)):
        assert saved_states(partial(run, beta=beta), x) == num
        forgotten = gradients(partial(run, beta=beta), x, branches)
        assert_close(forgotten, gradients(partial(run, beta=beta, recompute=False), x, branches), relative=1e-6)


@pytest.mark.parametrize(("alpha", "beta"), [(1, 0.3), (0.7, 0.3), (0.5, 0.5), (0.3, 0.7), (0, 1)])
def test_errors_grow_as_predicted(alpha, beta) -> None:
    """Branches that do not look at their input, float32 against float64, all the way back."""
    length, coupling = 12, Coupling(alpha, beta)
    generator = torch.Generator().manual_seed(0)
    updates = torch.randn(length, 4096, generator=generator)
    exact = [torch.randn(4096, generator=generator)] * 2
    previous = current = exact[0]
    for update in updates:
        previous, current = current, coupling.advance(previous, current, update, owned=False)
    following, state = current.clone(), previous.clone()
    for update in reversed(updates[1:]):
        following, state = state, coupling.released(following.sub_(update), state)
    measured = float((state - exact[0]).norm() / exact[0].norm())
    predicted = 2**-24 * coupling.error_growth ** (length - 1)
    assert predicted / 10 < measured < predicted * 10


def test_error_growth_of_the_ends() -> None:
    assert SUM.error_growth == 1
    assert Coupling(1, 0).error_growth == inf
    assert Coupling(0.75, 0.25).error_growth == pytest.approx(4)
    # The larger root of 0.3 mu^2 = mu + 1.
    assert Coupling(1, 0.3).error_growth == pytest.approx(4.1387, rel=1e-4)


@pytest.mark.parametrize("frozen", [(0,), (3,), (0, 1, 2, 3, 4)])
@pytest.mark.parametrize("beta", [0.0, 0.4])
def test_frozen_branches_and_an_input_without_gradient(beta, frozen) -> None:
    branches = chain("transformer", 5).double()
    for index in frozen:
        branches[index].requires_grad_(False)
    for x in (states(dtype=torch.float64), states(dtype=torch.float64).requires_grad_()):
        found = []
        for run in (
            partial(run_reversibly, branches, coupling=Coupling(1 - beta, beta), owner=branches),
            partial(coupled, branches, alpha=1 - beta, beta=beta),
        ):
            branches.zero_grad()
            output = run(x)
            assert output.requires_grad == (x.requires_grad or len(frozen) < 5)
            if output.requires_grad:
                output.square().sum().backward()
            found.append({name: p.grad.clone() for name, p in branches.named_parameters() if p.grad is not None})
        assert_close(found[0], found[1], relative=1e-11)


def test_the_input_is_never_written() -> None:
    x = states()
    before, branches = x.clone(), chain("mlp", 12)
    for beta in (0.0, 0.1, 0.5, 0.9):
        run_reversibly(branches, x, coupling=Coupling(1 - beta, beta)).sum().backward()
        with torch.no_grad():
            run_reversibly(branches, x, coupling=Coupling(1 - beta, beta))
    assert torch.equal(x, before)
    assert x.shape[-1] == CHANNELS


@pytest.mark.parametrize(
    ("alpha", "beta", "name"), [(1.5, 0, "alpha is 1.5"), (0, -0.1, "beta is -0.1"), (0, float("nan"), "beta is nan")]
)
def test_values_outside_of_the_way_are_refused(alpha, beta, name) -> None:
    with pytest.raises(ValueError, match=rf"coupling: {name}; it lies in \[0, 1\]"):
        Coupling(alpha, beta)
