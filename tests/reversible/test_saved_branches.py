"""Branches at the end of a run that keep their activations change nothing but memory and time."""

from __future__ import annotations

import gc

import pytest
import torch
from reversible.networks import CHANNELS, assert_same_bits, chain, gradients, states

from re2tal.reversible import run_reversibly
from re2tal.reversible.chunking import ChunkedBranch, Piece, even_spans
from re2tal.reversible.coupling import Coupling
from re2tal.reversible.live_bytes import LiveBytes

LENGTH = 6


def in_pieces(branch):
    cut = lambda state: [Piece(0, (span,), branch) for span in even_spans(len(state), 2)]  # noqa: E731
    return ChunkedBranch("branch", branch, cut, same_draws=False)


@pytest.mark.parametrize("merge", ["mean", "extrapolate"])
@pytest.mark.parametrize("stored", [1, 3, 5, 6, 9])
@pytest.mark.parametrize("kind", ["transformer", "conv"])
def test_values_gradients_and_draws_are_the_same_bits(kind, stored, merge) -> None:
    # On a grid, where what is rebuilt is exact.
    found, wanted = (
        gradients(
            lambda x, stored=stored, branches=branches: run_reversibly(
                branches, x, saved_branches=stored, merge=merge, grid=2**-14, owner=branches
            ),
            states(),
            branches,
        )
        for stored, branches in ((stored, chain(kind, LENGTH, dropout=0.2)), (0, chain(kind, LENGTH, dropout=0.2)))
    )
    assert_same_bits(found, wanted)


@pytest.mark.parametrize("coupling", [Coupling(), Coupling(0.5, 0.5), Coupling(1.0, 0.0)])
@pytest.mark.parametrize("stored", [1, 4])
def test_so_it_is_in_pieces_and_with_other_couplings(stored, coupling) -> None:
    branches = chain("transformer", LENGTH, dropout=0.2)
    found, wanted = (
        gradients(
            lambda x, options=options: run_reversibly(
                [in_pieces(branch) for branch in branches], x, coupling=coupling, owner=branches, **options
            ),
            states(dtype=torch.float64),
            branches.double(),
        )
        for options in ({"saved_branches": stored}, {"recompute": False})
    )
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-12, msg=name)


def test_so_it_is_under_autocast() -> None:
    """Weights that autocast has cast without a gradient are not taken for those of stored branches."""
    branches = chain("transformer", LENGTH)

    def run(stored):
        def shared(x):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return run_reversibly([*branches, *branches], x, saved_branches=stored, owner=branches)

        return gradients(shared, states(), branches)

    assert_same_bits(run(4), run(0))


def test_every_branch_that_is_stored_costs_memory_and_saves_its_second_run() -> None:
    branches = chain("mlp", LENGTH)
    calls, peaks = [], []
    counted = [lambda x, one=one: calls.append(1) or one(x) for one in branches]
    for stored in range(LENGTH + 1):
        calls.clear()
        gc.collect()
        with LiveBytes() as live:
            output = run_reversibly(counted, torch.ones(64, 64, CHANNELS), saved_branches=stored)
            peaks.append(live.live)
            output.sum().backward()
        assert len(calls) == 2 * LENGTH - stored
    assert peaks == sorted(peaks)
    assert peaks[1] < peaks[2] < peaks[3]


def test_a_negative_number_is_refused() -> None:
    with pytest.raises(ValueError, match="saved_branches is -1; give a number of branches"):
        run_reversibly(chain("mlp", 2), torch.ones(1, 1, CHANNELS), saved_branches=-1)
