"""Linear layers of branches that are run again, with a backward that does less work than autograd's.

    y = x W^T + b        dx = dy W,   dW = dy^T x,   db = sum dy:   none of them needs y

If a branch runs in pieces, the matrix product adds dW directly to the sum over earlier pieces (`addmm`), instead of
writing it and adding it afterwards. If the branch's output was saved, y is not computed (`without_last_linear`).

Inside of a checkpoint that a branch sets, layers are left alone: it runs them once more, where they are not replaced,
and takes what the one run saves for what the other saves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from re2tal.reversible.recompute import hooks_on_saved

AddProduct = Callable[[Tensor, Tensor, Tensor], Tensor | None]
"""A leaf, dy^T and x -> its gradient, or None where that waits for further pieces."""


class Linear(torch.autograd.Function):
    """`F.linear`, or NaN instead of its result if not `finished`.

    Gradients come from the same products as autograd's, in the same order, so they are the same bits.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, add_product: AddProduct | None, finished: bool
    ) -> Tensor:
        """(.., in), (out, in), (out,) -> (.., out)."""
        ctx.save_for_backward(x, weight)
        ctx.leaf, ctx.add_product = weight if add_product else None, add_product
        if finished:
            return F.linear(x, weight, bias)
        # In the real output's layout: for an expanded scalar, CUDA's dropout draws other numbers from the same seed.
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
    """Inside, linear layers pass the two factors of their weight's gradient to `add_product`."""

    def __init__(self, add_product: AddProduct) -> None:
        super().__init__()
        self._add_product, self._hooks = add_product, hooks_on_saved()

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Calls `func`, but `Linear` instead of `F.linear`."""
        is_linear = func is F.linear and len(args) > 1 and not kwargs and hooks_on_saved() == self._hooks
        if is_linear and takes_products(*args[:2]):
            return Linear.apply(*(*args, None)[:3], self._add_product, True)
        return func(*args, **(kwargs or {}))


def takes_products(x: Tensor, weight: Tensor) -> bool:
    """Whether `weight` is a leaf that wants a gradient, and sums of it have the dtype of its products."""
    same = x.dtype == weight.dtype == torch.promote_types(weight.dtype, torch.float32)
    return same and weight.is_leaf and weight.requires_grad and not torch.is_autocast_enabled(x.device.type)
