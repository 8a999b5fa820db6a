"""Skips the last linear layer of a branch that is run again only for its graph, because its output was saved.

In a transformer block it is the MLP's second layer: half of the MLP's multiplications. Checkpointing skips it too, as
it stops early; a reversible run cannot unless the output was saved, because it inverts each state with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from re2tal.reversible.linear import AddProduct, Linear, takes_products
from re2tal.reversible.recompute import hooks_on_saved


@contextmanager
def without_last_linear(linear: nn.Linear | None, *, add_product: AddProduct | None = None) -> Iterator[None]:
    """Inside, `linear` returns NaN of the shape and with the graph of its output; None changes nothing.

    NaN makes most operations that use the values after all show it in the gradient; ReLU and clamp, which only compare,
    do not. The layer is still called as a module, so its hooks run, and ZeRO-3 gathers its parameters.
    """
    # A forward set on the instance by somebody else may do more than the linear map.
    if linear is None or "forward" in vars(linear):
        yield
        return
    linear.forward = partial(_without_values, linear, add_product, hooks_on_saved())  # type: ignore[method-assign]
    try:
        yield
    finally:
        del linear.forward


def _without_values(linear: nn.Linear, add_product: AddProduct | None, hooks: Any, x: Tensor) -> Tensor:
    if hooks_on_saved() != hooks:
        return nn.Linear.forward(linear, x)
    operands = (x, linear.weight, linear.bias)
    kind = x.device.type
    # Autocast casts in F.linear, which is not called here; the graph must have the dtypes it would have.
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        x, weight, bias = (each if each is None or each.dtype == torch.float64 else each.to(dtype) for each in operands)
    else:
        x, weight, bias = operands
    return Linear.apply(x, weight, bias, add_product if takes_products(x, weight) else None, False)
