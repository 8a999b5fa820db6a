"""The coupling of a rewired residual network, and its inverse.

    advance:  x[i+1] = x[i-1] + F_i(x[i])
    rewind:   x[i-1] = x[i+1] - F_i(x[i])

Gradients obey the first equation too, walking backwards: dx[i] gains dF_i(x[i])^T dx[i+1], and dx[i+1] becomes dx[i-1].
"""

from __future__ import annotations

from torch import Tensor


def advance(previous: Tensor, update: Tensor, *, owned: bool) -> Tensor:
    """x[i-1], F_i(x[i]) -> x[i+1]; in the buffer of x[i-1] where the caller owns it.

    `update` may have a narrower dtype than `previous`; the sum is taken, without a copy, in the wider one.
    """
    return previous.add_(update) if owned else previous + update


def rewind(following: Tensor, update: Tensor) -> Tensor:
    """x[i+1], F_i(x[i]) -> x[i-1], in the buffer of x[i+1]."""
    return following.sub_(update)
