"""What registrations say about a block, where the families' own tests do not ask: places that are not residual."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from re2tal.rewire.branches import (
    Branch,
    NotResidual,
    Residual,
    is_unregistered,
    registered,
    residual_branches,
    why_not_residual,
    wrap_output,
)


class Widening(nn.Module):
    """Residual where its width stays."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, out)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x) if self.linear.in_features == self.linear.out_features else self.linear(x)


class Named(Widening):
    """Residual as its parent, but says more where it is not."""


@residual_branches.register
def _(block: Widening) -> tuple[Branch, ...]:
    same = block.linear.in_features == block.linear.out_features
    return (Branch("linear", lambda block, x: block.linear(x)),) if same else ()


@why_not_residual.register
def _(block: Named) -> str:
    return f"it widens {block.linear.in_features} to {block.linear.out_features}"


@pytest.mark.parametrize("kind", [Widening, Named])
def test_a_type_is_residual_in_some_places_only(kind: type[Widening]) -> None:
    block, x = kind(4, 4), torch.randn(2, 4)
    found = registered(block)
    assert isinstance(found, Residual)
    (branch,) = found.branches
    assert torch.equal(found.wrap(block, x + branch.function(block, x)), block(x))
    assert isinstance(registered(kind(4, 6)), NotResidual)
    assert not is_unregistered(kind(4, 6))


def test_the_reason_is_the_types_own_where_it_has_one() -> None:
    assert registered(Widening(4, 6)) == NotResidual("this Widening does not add to its input")
    assert registered(Named(4, 6)) == NotResidual("it widens 4 to 6")


def test_a_type_that_nobody_registered_is_said_to_be_that() -> None:
    assert registered(nn.ReLU()) == NotResidual("nothing is registered for ReLU")
    assert is_unregistered(nn.ReLU())
    x = torch.ones(1)
    assert wrap_output(nn.ReLU(), x) is x
