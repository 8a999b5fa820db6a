"""A branch sees in backward the draws it saw in forward; everything else sees what plain execution would give it."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from reversible.networks import assert_close, assert_same_bits, chain, coupled, gradients, states

from re2tal.reversible import run_reversibly
from re2tal.reversible.rng import GeneratorState

CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", ["transformer", "conv"])
@pytest.mark.parametrize("length", [1, 2, 5])
def test_dropout_and_drop_path_are_those_of_the_plain_network(kind, length) -> None:
    """The same generator gives the same masks, and stands at the same place afterwards ("next draw")."""
    branches, x = chain(kind, length, dropout=0.3).double(), states(dtype=torch.float64)
    for seed in (1, 2):
        wanted = gradients(partial(coupled, branches), x, branches, seed=seed)
        found = gradients(partial(run_reversibly, branches, owner=branches), x, branches, seed=seed)
        assert torch.equal(found["output"], wanted["output"])
        assert torch.equal(found["next draw"], wanted["next draw"])
        assert_close(found, wanted, relative=1e-12)


def test_gradients_are_the_same_bits_on_a_grid() -> None:
    branches, x = chain("transformer", 8, dropout=0.3), states()
    kept, forgotten = (partial(run_reversibly, branches, recompute=recompute, grid=2**-14) for recompute in (0, 1))
    assert_same_bits(gradients(forgotten, x, branches), gradients(kept, x, branches))


def test_every_step_draws_anew() -> None:
    branches, x = chain("transformer", 3, dropout=0.5), states()
    outputs = [run_reversibly(branches, x).detach() for _ in range(6)]
    assert all(not torch.equal(one, other) for i, one in enumerate(outputs) for other in outputs[:i])


def test_backward_leaves_the_generator_where_it_was() -> None:
    branches = chain("transformer", 4, dropout=0.5)
    output = run_reversibly(branches, states())
    torch.rand(7)
    before = torch.get_rng_state()
    output.sum().backward()
    assert torch.equal(torch.get_rng_state(), before)


def test_the_generator_is_put_back_when_a_branch_fails() -> None:
    start = GeneratorState.now(CPU)
    torch.rand(5)
    before = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), start.replayed():
        1 / 0  # noqa: B018
    assert torch.equal(torch.get_rng_state(), before)


def test_a_replay_repeats_the_draws() -> None:
    start = GeneratorState.now(CPU)
    first, second = torch.rand(5), torch.rand(5)
    with start.replayed():
        assert torch.equal(torch.rand(5), first)
    after = GeneratorState.now(CPU)
    assert not after.same_as(start)
    with start.replayed():
        torch.rand(5)
        assert torch.equal(torch.rand(5), second)
    assert GeneratorState.now(CPU).same_as(after)


@pytest.mark.gpu
def test_dropout_on_a_device_is_replayed_and_its_generator_left_alone() -> None:
    device = torch.device("cuda")
    branches, x = chain("transformer", 6, dropout=0.3).to(device), states().to(device)

    def found(recompute: bool) -> list[torch.Tensor]:
        torch.cuda.manual_seed(3)
        branches.zero_grad()
        run_reversibly(branches, x, recompute=recompute, grid=2**-14, owner=branches).square().sum().backward()
        return [*(parameter.grad for parameter in branches.parameters()), torch.rand(3, device=device)]

    assert all(torch.equal(one, other) for one, other in zip(found(True), found(False), strict=True))
