"""What a run keeps, counted in tensors and in bytes: it must not grow with the number of branches."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from reversible.networks import CHANNELS, chain
from torch import Tensor, nn

from re2tal.reversible import run_reversibly
from re2tal.reversible.live_bytes import LiveBytes

STATE = (64, 64, CHANNELS)
STATE_BYTES = 4 * 64 * 64 * CHANNELS


def peak_in_states(run, *, length: int, kind: str = "mlp") -> float:
    """Peak of live bytes in forward and backward, in units of one state; parameters' gradients exist before."""
    branches = chain(kind, length)
    for parameter in branches.parameters():
        parameter.grad = torch.zeros_like(parameter)
    x = torch.ones(STATE)
    x = (x.transpose(1, 2).contiguous() if kind == "conv" else x).requires_grad_()
    gc.collect()
    with LiveBytes() as bytes_:
        run(branches, x).sum().backward()
    return bytes_.peak / STATE_BYTES


def plain(branches, x):
    for branch in branches:
        x = x + branch(x)
    return x


def test_the_tracker_sees_what_plain_autograd_keeps() -> None:
    assert 1.9 < peak_in_states(plain, length=24) / peak_in_states(plain, length=12) < 2.1


@pytest.mark.parametrize("merge", ["mean", "extrapolate"])
@pytest.mark.parametrize("kind", ["mlp", "transformer", "conv"])
def test_the_peak_does_not_grow_with_depth(kind, merge) -> None:
    run = lambda branches, x: run_reversibly(branches, x, merge=merge, owner=branches)  # noqa: E731
    shallow, deep = (peak_in_states(run, length=length, kind=kind) for length in (6, 48))
    assert deep <= 1.01 * shallow


def test_a_run_keeps_two_states_and_what_autograd_holds_around_it() -> None:
    """Branches that cost nothing: two states, two gradients, x's gradient and the merged output are all there is."""
    scale = nn.Parameter(torch.ones(()))
    run = lambda branches, x: run_reversibly([lambda x: x * scale] * 16, x)  # noqa: E731
    assert peak_in_states(run, length=1) < 7.5


@pytest.mark.parametrize("length", [2, 3, 16])
def test_two_tensors_are_saved_whatever_the_depth(length) -> None:
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        output = run_reversibly(chain("transformer", length, dropout=0.1), torch.ones(STATE))
    assert [tensor.shape for tensor in saved] == [output.shape] * 2
    assert output.untyped_storage()._cdata not in {tensor.untyped_storage()._cdata for tensor in saved}


def test_one_branch_saves_only_its_input() -> None:
    saved: list[Tensor] = []
    x = torch.ones(STATE)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        output = run_reversibly(chain("mlp", 1), x)
    assert [tensor.data_ptr() for tensor in saved] == [x.data_ptr()]
    del output


def test_a_run_whose_backward_never_comes_lets_go_of_its_states() -> None:
    kept: list[weakref.ref] = []

    def observed(x):
        kept.append(weakref.ref(x.untyped_storage()))
        return x * 0.5

    output = run_reversibly([observed] * 4, torch.ones(STATE))
    assert any(reference() is not None for reference in kept)
    del output
    gc.collect()
    assert all(reference() is None for reference in kept[1:])


def test_no_state_is_kept_where_no_gradient_is_wanted() -> None:
    with LiveBytes() as bytes_, torch.no_grad():
        run_reversibly([lambda x: x * 0.5] * 32, torch.ones(STATE))
    assert bytes_.peak <= 5 * STATE_BYTES


def test_the_gradient_of_a_runs_output_is_gone_while_its_branches_are_differentiated() -> None:
    """Where torch lets it go: since 2.12."""
    gradients: list[weakref.ref] = []
    alive: list[bool] = []

    class Look(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            alive.append(gradients[0]() is not None)
            return gradient

    class Remember(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            given = gradient * 2
            gradients.append(weakref.ref(given.untyped_storage()))
            return given

    x = torch.ones(3, CHANNELS, requires_grad=True)
    Remember.apply(run_reversibly([Look.apply] * 3, x)).sum().backward()
    assert alive == [not hasattr(torch.autograd.Function, "boxed_grads_call")] * 3
