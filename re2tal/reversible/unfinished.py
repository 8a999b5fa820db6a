"""Runs a branch for its graph alone: where what it adds is known, its last linear layer is not computed again.

    y = x W^T + b        dx = dy W,   dW = dy^T x,   db = sum dy:   y itself is in none of them

In a transformer block this layer is a third of the multiplications of an MLP's forward, and what keeps checkpointing,
which stops before it, ahead of a run that must know every update to invert it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def unfinished(linear: nn.Linear | None) -> Iterator[None]:
    """Inside, `linear` returns NaN of the shape and with the graph of its output; None changes nothing.

    Not a number, so that most operations behind it which do need its values show it in the gradient; ReLU and clamp,
    which only compare, do not. It is called as a module all the same: its hooks run, and ZeRO-3 gathers its parameters.
    """
    if linear is None or "forward" in vars(linear):  # somebody else's forward may do more than the linear map
        yield
        return
    linear.forward = partial(_without_values, linear)  # type: ignore[method-assign]
    try:
        yield
    finally:
        del linear.forward


def _without_values(linear: nn.Linear, x: Tensor) -> Tensor:
    operands = (x, linear.weight, linear.bias)
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        x, weight, bias = (each if each is None or each.dtype == torch.float64 else each.to(dtype) for each in operands)
    else:
        x, weight, bias = operands
    return _Unfinished.apply(x, weight, bias)


class _Unfinished(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        # Laid out as the layer's output is: for an expanded number, CUDA's dropout draws differently from one seed.
        return x.new_full((*x.shape[:-1], len(weight)), torch.nan)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        # The products that autograd takes for `linear`, in its order: the same bits.
        x, weight = ctx.saved_tensors
        rows = gradient.reshape(-1, gradient.shape[-1])
        with torch.autocast(gradient.device.type, enabled=False):
            to_x = (rows @ weight).view_as(x) if ctx.needs_input_grad[0] else None
            to_weight = rows.t() @ x.reshape(-1, x.shape[-1]) if ctx.needs_input_grad[1] else None
            to_bias = rows.sum(0) if ctx.needs_input_grad[2] else None
        return to_x, to_weight, to_bias
