"""Branches run in pieces: the values and gradients of whole ones, every gradient hook once, and less memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from reversible.networks import CHANNELS, DropPath, assert_close, assert_same_bits, chain, coupled, gradients, states
from reversible.test_memory import peak_in_states
from torch import Tensor, nn

from re2tal.reversible import run_reversibly
from re2tal.reversible.chunking import ChunkedBranch, Piece, even_spans, pieces_of
from re2tal.reversible.live_bytes import LiveBytes

MERGES = ("mean", "extrapolate")


def cut_evenly(function: Callable[[Tensor], Tensor], num: int, *, axis: int) -> ChunkedBranch:
    """`function` in `num` pieces along `axis`; those along the first are samples."""

    def cut(state: Tensor) -> list[Piece]:
        return [Piece(axis, (span,), function) for span in even_spans(state.shape[axis], num)]

    return ChunkedBranch("cut", function, cut, same_draws=axis > 0)


def chunked(branches: nn.ModuleList, num: int, *, axis: int = 0) -> list[ChunkedBranch]:
    return [cut_evenly(branch, num, axis=axis) for branch in branches]


def first_and_last_together(state: Tensor, function: Callable[[Tensor], Tensor]) -> list[Piece]:
    """Three pieces along the second axis, one of them of two spans, the last one first."""
    return [Piece(1, ((2, 5),), function), Piece(1, ((6, 8), (0, 2)), function), Piece(1, ((5, 6),), function)]


@pytest.mark.parametrize(
    ("length", "num", "wanted"),
    [
        (7, 3, [(0, 2), (2, 4), (4, 7)]),
        (2, 8, [(0, 1), (1, 2)]),
        (1, 4, [(0, 1)]),
        (5, 1, [(0, 5)]),
        (5, 0, [(0, 5)]),
    ],
)
def test_even_spans_cover_an_axis(length, num, wanted) -> None:
    assert even_spans(length, num) == wanted


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize("length", [1, 2, 3, 5, 8])
@pytest.mark.parametrize(("kind", "num", "axis"), [("transformer", 2, 0), ("mlp", 3, 1), ("mlp", 64, 1)])
def test_pieces_give_what_whole_branches_give(kind, num, axis, length, merge, recompute) -> None:
    branches, x = chain(kind, length).double(), states(dtype=torch.float64)
    wanted = gradients(partial(coupled, branches, merge=merge), x, branches)
    run = partial(run_reversibly, chunked(branches, num, axis=axis), merge=merge, recompute=recompute, owner=branches)
    assert_close(gradients(run, x, branches), wanted, relative=1e-12)


@pytest.mark.parametrize("recompute", [True, False])
def test_pieces_of_several_spans(recompute) -> None:
    branches, x = chain("mlp", 4).double(), states(dtype=torch.float64)
    cut = [ChunkedBranch("cut", f, partial(first_and_last_together, function=f), same_draws=True) for f in branches]
    wanted = gradients(partial(coupled, branches), x, branches)
    run = partial(run_reversibly, cut, recompute=recompute, owner=branches)
    assert_close(gradients(run, x, branches), wanted, relative=1e-12)


class AddsParameters(nn.Module):
    """A branch whose parameters have the shape of a piece, so that their gradients are the state's own, unreduced."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.linear = nn.Linear(shape[-1], shape[-1])
        self.first, self.second = (nn.Parameter(torch.randn(shape)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x)) + self.first + self.second


def test_parameters_that_are_only_added_get_sums_of_their_own() -> None:
    x = states(dtype=torch.float64)
    branches = nn.ModuleList(AddsParameters(x[:1].shape) for _ in range(3)).double()
    wanted = gradients(partial(coupled, branches), x, branches)
    run = partial(run_reversibly, chunked(branches, len(x)), owner=branches)
    assert_close(gradients(run, x, branches), wanted, relative=1e-12)


@pytest.mark.parametrize("whole", [0, 1, 3])
def test_whole_branches_between_cut_ones(whole) -> None:
    branches, x = chain("transformer", 4, dropout=0.2).double(), states(dtype=torch.float64)
    mixed = [f if index == whole else cut_evenly(f, 3, axis=0) for index, f in enumerate(branches)]
    kept, forgotten = (partial(run_reversibly, mixed, recompute=recompute, owner=branches) for recompute in (0, 1))
    assert_close(gradients(forgotten, x, branches), gradients(kept, x, branches), relative=1e-12)


@pytest.mark.parametrize("num", [0, 1])
def test_a_single_piece_is_the_whole_branch_to_the_last_bit(num) -> None:
    branches, x = chain("transformer", 5, dropout=0.2), states()
    assert not pieces_of(chunked(branches, num)[0], x)
    whole, cut = (partial(run_reversibly, each, owner=branches) for each in (branches, chunked(branches, num)))
    assert_same_bits(gradients(cut, x, branches), gradients(whole, x, branches))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kind", "axis"), [("transformer", 0), ("mlp", 1)])
def test_on_the_grid_every_piece_is_rebuilt_to_the_last_bit(kind, axis, dtype) -> None:
    """Gradients then differ by sums alone: the engine adds those of the pieces in float32, autograd in bfloat16."""
    branches, x = chain(kind, 24, dropout=0.2).to(dtype), states().to(dtype)
    seen: list[Tensor] = []
    for branch in branches:
        branch.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().clone()))

    def run(x: Tensor, *, recompute: bool) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is None):
            return run_reversibly(chunked(branches, 3, axis=axis), x, recompute=recompute, owner=branches)

    kept = gradients(partial(run, recompute=False), x, branches)
    seen.clear()
    forgotten = gradients(partial(run, recompute=True), x, branches)
    forward, backward = seen[:72], seen[72:]
    again = [backward[first + number] for first in reversed(range(0, 72, 3)) for number in range(3)]
    assert all(torch.equal(one, other) for one, other in zip(again, forward, strict=True))
    assert torch.equal(forgotten["output"], kept["output"])
    assert_close(forgotten, kept, relative=2e-2)


def test_on_the_grid_pieces_have_the_bits_of_whole_branches() -> None:
    """An MLP's kernels do not depend on how many tokens there are, at these sizes."""
    branches, x = chain("mlp", 12), states()
    whole, cut = (
        gradients(partial(run_reversibly, each, grid=2**-14, owner=branches), x, branches)
        for each in (branches, chunked(branches, 2, axis=1))
    )
    assert torch.equal(whole["output"], cut["output"])
    assert_close(cut, whole, relative=1e-5)


@pytest.mark.parametrize(("num", "axis"), [(3, 0), (4, 1)])
def test_draws_are_replayed_piece_by_piece(num, axis) -> None:
    branches, x = chain("mlp", 5, dropout=0.4).double(), states(dtype=torch.float64)
    cut = chunked(branches, num, axis=axis)
    kept, forgotten = (partial(run_reversibly, cut, recompute=recompute, owner=branches) for recompute in (0, 1))
    for seed in (1, 2):
        assert_close(
            gradients(forgotten, x, branches, seed=seed), gradients(kept, x, branches, seed=seed), relative=1e-12
        )


def test_samples_in_different_pieces_draw_differently() -> None:
    drop = nn.Dropout(0.5)
    update = run_reversibly([cut_evenly(drop, 3, axis=0)], torch.ones(3, 64)) * 2 - 2
    assert len(update.unique(dim=0)) == 3


def test_drop_path_drops_a_sample_in_all_of_its_pieces_as_it_would_whole() -> None:
    branches = nn.ModuleList(nn.Sequential(nn.Linear(CHANNELS, CHANNELS), DropPath(0.5)) for _ in range(6)).double()
    x = states(dtype=torch.float64)
    wanted = gradients(partial(coupled, branches), x, branches)
    found = gradients(partial(run_reversibly, chunked(branches, 5, axis=1), owner=branches), x, branches)
    assert torch.equal(found["next draw"], wanted["next draw"])
    assert_close(found, wanted, relative=1e-12)


def test_backward_leaves_the_generator_where_it_was() -> None:
    output = run_reversibly(chunked(chain("mlp", 4, dropout=0.5), 3, axis=1), states())
    torch.rand(7)
    before = torch.get_rng_state()
    output.sum().backward()
    assert torch.equal(torch.get_rng_state(), before)


def test_hooks_fire_once_and_see_the_gradient_of_all_pieces() -> None:
    branches, x = chain("transformer", 5).double(), states(dtype=torch.float64)
    wanted = gradients(partial(coupled, branches), x, branches)
    seen: dict[str, list[Tensor]] = {}
    for name, parameter in branches.named_parameters():
        parameter.register_hook(lambda gradient, name=name: seen.setdefault(name, []).append(gradient.clone()))
        parameter.register_post_accumulate_grad_hook(lambda p, name=f"{name} +": seen.setdefault(name, []).append(p))
    for _ in range(2):
        seen.clear()
        gradients(partial(run_reversibly, chunked(branches, 3), owner=branches), x, branches)
        assert len(seen) == 2 * len(list(branches.parameters()))
        assert all(len(calls) == 1 for calls in seen.values())
        assert_close({n: seen[n][0] for n, _ in branches.named_parameters()}, {n: wanted[n] for n, _ in
                     branches.named_parameters()}, relative=1e-12)  # fmt: skip


def test_a_hook_that_scales_a_gradient_scales_that_of_all_pieces() -> None:
    branches, x = chain("mlp", 3).double(), states(dtype=torch.float64)
    for parameter in branches.parameters():
        parameter.register_hook(lambda gradient: gradient * 0.25)
    wanted = gradients(partial(coupled, branches), x, branches)
    found = gradients(partial(run_reversibly, chunked(branches, 4, axis=1), owner=branches), x, branches)
    assert_close(found, wanted, relative=1e-12)


def test_hooks_are_put_back_when_a_branch_fails_in_backward() -> None:
    branches, x = chain("mlp", 1), states()
    seen: list[Tensor] = []
    branches[0].down.bias.register_hook(seen.append)
    output = run_reversibly(chunked(branches, 2, axis=1), x)
    branches[0].up.register_full_backward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        output.sum().backward()
    branches[0].up._backward_hooks.clear()
    run_reversibly(chunked(branches, 2, axis=1), x).sum().backward()
    assert len(seen) == 1


def test_gradients_of_several_steps_accumulate() -> None:
    branches = chain("transformer", 4).double()
    for seed in (0, 1):
        run_reversibly(chunked(branches, 3), states(seed, dtype=torch.float64)).square().sum().backward()
    found = [parameter.grad.clone() for parameter in branches.parameters()]
    branches.zero_grad()
    sum(coupled(branches, states(seed, dtype=torch.float64)).square().sum() for seed in (0, 1)).backward()
    for got, parameter in zip(found, branches.parameters(), strict=True):
        torch.testing.assert_close(got, parameter.grad, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("frozen", [(0,), (1, 3), (0, 1, 2, 3)])
def test_frozen_branches_and_a_frozen_stem(frozen) -> None:
    branches, x = chain("mlp", 4).double(), states(dtype=torch.float64)
    for index in frozen:
        branches[index].requires_grad_(False)
    cut = chunked(branches, 3, axis=1)
    wanted = gradients(partial(coupled, branches), x, branches)
    assert_close(gradients(partial(run_reversibly, cut, owner=branches), x, branches), wanted, relative=1e-12)
    branches.zero_grad()
    run_reversibly(cut, x).square().sum().backward()
    assert all((p.grad is not None and bool(p.grad.any())) == p.requires_grad for p in branches.parameters())


def test_pieces_that_use_different_parameters_are_refused() -> None:
    first, second = chain("mlp", 2)
    cut = ChunkedBranch(
        "cut", first, lambda x: [Piece(1, ((0, 4),), first), Piece(1, ((4, 8),), second)], same_draws=True
    )
    output = run_reversibly([cut], states())
    with pytest.raises(RuntimeError, match="the last piece of a branch does not use 6 of the parameters that other"):
        output.sum().backward()


def test_a_piece_that_changes_shape_is_refused_by_the_name_of_its_branch() -> None:
    cut = cut_evenly(lambda x: x[:, :1], 2, axis=1)
    with pytest.raises(ValueError, match=r"branch 0 \(cut\) turns a tensor of shape \(3, 4, 8\) into \(3, 1, 8\)"):
        run_reversibly([cut], states())


@pytest.mark.parametrize("length", [6, 48])
def test_the_peak_is_that_of_a_piece(length) -> None:
    """MLPs in 8 pieces; whole ones need 15.4 states."""
    run = lambda branches, x: run_reversibly(chunked(branches, 8, axis=1), x, owner=branches)  # noqa: E731
    whole = lambda branches, x: run_reversibly(branches, x, owner=branches)  # noqa: E731
    peak = peak_in_states(run, length=length)
    assert peak < 0.65 * peak_in_states(whole, length=length)
    assert peak <= 1.02 * peak_in_states(run, length=6)


def test_while_the_first_branch_is_differentiated_the_older_gradient_is_gone() -> None:
    """Of five states one is the end of forward, and later the gradient of x."""
    run = lambda branches, x: run_reversibly(chunked(branches, 64, axis=1), x, owner=branches)  # noqa: E731
    assert peak_in_states(run, length=2) < 5.01


def test_gradients_of_parameters_that_outweigh_states_are_held_once() -> None:
    """Two weights of 64 x 256 each, which is 64 KiB, and states of 4 KiB: their sums, and one part that is added."""
    branch = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
    for parameter in branch.parameters():
        parameter.grad = torch.zeros_like(parameter)
    x = torch.ones(4, 4, 64, requires_grad=True)
    with LiveBytes() as live:
        run_reversibly([cut_evenly(branch, 4, axis=0)], x).sum().backward()
    assert live.peak < 2**10 * (3 * 64 + 10 * 4)
