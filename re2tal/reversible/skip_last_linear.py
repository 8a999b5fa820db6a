"""Runs a branch for its graph alone: where what it adds is known, its last linear layer is not computed again.

In a transformer block this layer is a third of the multiplications of an MLP's forward, and what keeps checkpointing,
which stops before it, ahead of a run that must know every update to invert it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from re2tal.reversible.linear import AddProduct, Linear, takes_products


@contextmanager
def without_last_linear(linear: nn.Linear | None, *, add_product: AddProduct | None = None) -> Iterator[None]:
    """Inside, `linear` returns NaN of the shape and with the graph of its output; None changes nothing.

    Not a number, so that most operations behind it which do need its values show it in the gradient; ReLU and clamp,
    which only compare, do not. It is called as a module all the same: its hooks run, and ZeRO-3 gathers its parameters.
    """
    if linear is None or "forward" in vars(linear):  # somebody else's forward may do more than the linear map
        yield
        return
    linear.forward = partial(_without_values, linear, add_product)  # type: ignore[method-assign]
    try:
        yield
    finally:
        del linear.forward


def _without_values(linear: nn.Linear, add_product: AddProduct | None, x: Tensor) -> Tensor:
    operands = (x, linear.weight, linear.bias)
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        x, weight, bias = (each if each is None or each.dtype == torch.float64 else each.to(dtype) for each in operands)
    else:
        x, weight, bias = operands
    return Linear.apply(x, weight, bias, add_product if takes_products(x, weight) else None, False)
