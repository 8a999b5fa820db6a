"""Linear layers of branches that are run again, whose backward does less than autograd's.

    y = x W^T + b        dx = dy W,   dW = dy^T x,   db = sum dy:   y itself is in none of them

Where a branch runs in pieces, dW is added to the sum of the pieces before by the product itself, instead of being
written, read again and added. Where what a branch adds is known, y is not computed (`without_last_linear`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

AddProduct = Callable[[Tensor, Tensor, Tensor], Tensor | None]
"""A leaf, dy^T and x -> its gradient, or None where that waits for further pieces."""


class Linear(torch.autograd.Function):
    """`F.linear`, or NaN in its place where it is not `finished`; gradients by the products that autograd takes for it,
    in its order: the same bits."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, add_product: AddProduct | None, finished: bool
    ) -> Tensor:
        """(.., in), (out, in), (out,) -> (.., out)."""
        ctx.save_for_backward(x, weight)
        ctx.leaf, ctx.add_product = weight if add_product else None, add_product
        if finished:
            return F.linear(x, weight, bias)
        # Laid out as the layer's output is: for an expanded number, CUDA's dropout draws differently from one seed.
        return x.new_full((*x.shape[:-1], len(weight)), torch.nan)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        """(.., out) -> the gradients of x, weight and bias."""
        x, weight = ctx.saved_tensors
        rows, columns = gradient.reshape(-1, gradient.shape[-1]), x.reshape(-1, x.shape[-1])
        to_x = to_weight = to_bias = None
        with torch.autocast(gradient.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                to_x = (rows @ weight).view_as(x)
            if ctx.needs_input_grad[1]:
                to_weight = ctx.add_product(ctx.leaf, rows.t(), columns) if ctx.add_product else rows.t() @ columns
            if ctx.needs_input_grad[2]:
                to_bias = rows.sum(0)
        return to_x, to_weight, to_bias, None, None


class AddingProducts(TorchFunctionMode):
    """Inside, linear layers give the products that are their weights' gradients to `add_product`."""

    def __init__(self, add_product: AddProduct) -> None:
        super().__init__()
        self._add_product = add_product

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Calls `func`, and `Linear` in the place of `F.linear`."""
        if func is F.linear and len(args) > 1 and not kwargs and takes_products(*args[:2]):
            return Linear.apply(*(*args, None)[:3], self._add_product, True)
        return func(*args, **(kwargs or {}))


def takes_products(x: Tensor, weight: Tensor) -> bool:
    """Whether the gradient of `weight` is a leaf's, and summed in the numbers that its products are in."""
    same = x.dtype == weight.dtype == torch.promote_types(weight.dtype, torch.float32)
    return same and weight.is_leaf and weight.requires_grad and not torch.is_autocast_enabled(x.device.type)
