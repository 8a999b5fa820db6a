"""What cannot work is refused in words, naming the branch and what to do."""

from __future__ import annotations

import pytest
import torch
from reversible.networks import chain, states
from torch import nn

from re2tal.reversible import run_reversibly


class Widen(nn.Module):
    def forward(self, x):
        return torch.cat([x, x], dim=-1)


@pytest.mark.parametrize("recompute", [True, False])
def test_a_branch_that_changes_shape(recompute) -> None:
    message = r"branch 1 \(Widen\) turns a tensor of shape \(3, 8, 8\) into \(3, 8, 16\); .* leave this one outside"
    with pytest.raises(ValueError, match=message):
        run_reversibly([nn.Identity(), Widen()], states(), recompute=recompute)


def test_a_branch_that_would_broadcast() -> None:
    def mean_over_tokens(x):
        return x.mean(1, keepdim=True)

    with pytest.raises(ValueError, match=r"branch 0 \(mean_over_tokens\) turns .* into \(3, 1, 8\)"):
        run_reversibly([mean_over_tokens], states())


def test_a_branch_that_returns_no_tensor() -> None:
    def pair(x):
        return x, None

    with pytest.raises(
        ValueError, match=r"branch 0 \(pair\) turns .* into tuple; a residual branch returns one tensor"
    ):
        run_reversibly([pair], states())


@pytest.mark.parametrize(
    ("x", "output"), [(torch.float32, torch.float64), (torch.bfloat16, torch.float32), (torch.float32, torch.complex64)]
)
def test_a_branch_that_widens_its_numbers(x, output) -> None:
    with pytest.raises(ValueError, match=rf"branch 0 \(<lambda>\) turns {x} into {output}; .* keeps the dtype"):
        run_reversibly([lambda x: x.to(output)], states().to(x))


def test_an_unknown_merge() -> None:
    with pytest.raises(ValueError, match=r"unknown merge 'sum'; known: \['mean', 'extrapolate'\]"):
        run_reversibly([], states(), merge="sum")


def test_integer_states() -> None:
    with pytest.raises(ValueError, match=r"needs floating point states, got torch\.int64; convert x first"):
        run_reversibly([nn.Identity()], torch.ones(3, dtype=torch.int64))


def test_second_derivatives() -> None:
    x = states().requires_grad_()
    output = run_reversibly(chain("mlp", 2), x).square().sum()
    with pytest.raises(RuntimeError, match=r"no second derivatives: backward was called with create_graph=True"):
        torch.autograd.grad(output, x, create_graph=True)


@pytest.mark.parametrize("length", [1, 3])
def test_a_second_backward_through_states_that_are_gone(length) -> None:
    output = run_reversibly(chain("mlp", length), states()).sum()
    output.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"went through a reversible run twice, but the first time consumed"):
        output.backward()


def test_both_are_possible_when_activations_are_kept() -> None:
    branches, x = chain("mlp", 2).double(), states(dtype=torch.float64).requires_grad_()
    output = run_reversibly(branches, x, recompute=False).square().sum()
    (gradient,) = torch.autograd.grad(output, x, create_graph=True)
    gradient.square().sum().backward()
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("place", [0, 1])
def test_a_branch_that_writes_to_its_input_is_refused(recompute, place) -> None:
    weight = nn.Parameter(torch.ones(1))
    branches = [lambda x: x * weight, lambda x: x * weight]
    branches[place] = lambda x: x.mul_(3) * weight
    with pytest.raises((ValueError, RuntimeError), match=r"writes to its input, a state of the run|in-place operation"):
        run_reversibly(branches, torch.ones(2, 3), recompute=recompute, owner=nn.ParameterList([weight]))


def test_under_inference_mode_a_branch_that_writes_to_its_input_spoils_no_state() -> None:
    """Inference tensors count no versions, so such a write cannot be refused there."""

    def doubles(x: torch.Tensor) -> torch.Tensor:
        return x.mul_(2).sin()

    branches = [doubles, torch.cos, doubles]
    x = torch.linspace(-1, 1, 12, dtype=torch.float64).view(1, 3, 4)
    with torch.inference_mode():
        given = x.clone()
        found = run_reversibly(branches, given)
    assert torch.equal(given, x)
    first = x + (2 * x).sin()
    second = x + first.cos()
    third = first + (2 * second).sin()
    torch.testing.assert_close(found, (second + third) / 2)
