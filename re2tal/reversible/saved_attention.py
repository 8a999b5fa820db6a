"""Saves what attention kernels return in forward, so that a branch that runs again need not run them again.

The products of an attention's weights take a quarter of a ViT-B on 1568 tokens and give one state. Saved are the
output, and the row sums that the kernel's own backward takes. Queries, keys and values are computed again: the backward
needs them, and they would be three states.

The replay must call the same kernels: not so where a mask wants a gradient, for which a CPU has another one. That, and
a branch that writes to what a kernel returned, are errors.

Only fused kernels without dropout are saved. One with dropout draws, and the draws behind it in the branch would be
others if it did not run again. Attention that is written as matrix products is run again like everything else.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_aten = torch.ops.aten
_EFFICIENT = _aten._scaled_dot_product_efficient_attention.default
_DROPOUT = {
    _aten._scaled_dot_product_flash_attention.default: 3,
    _aten._scaled_dot_product_flash_attention_for_cpu.default: 3,
    _EFFICIENT: 5,
}
"""The kernels, and the place of the dropout rate among their arguments."""
_WITH_SUMS = 4
"""The place of `compute_log_sumexp` among the arguments of the efficient kernel."""


class KernelCall(NamedTuple):
    """One call of an attention kernel."""

    kernel: OpOverload
    outputs: tuple[Any, ...]
    """As the kernel returned them: tensors, and a few numbers."""


KernelCalls = deque[KernelCall]
"""The calls in one run of a branch, or of a piece of it, in the order of forward."""


@contextmanager
def saving_attention(calls: KernelCalls) -> Iterator[None]:
    """Inside, calls of attention kernels are added to `calls`."""
    with _Saving(calls):
        yield


@contextmanager
def replaying_attention(calls: KernelCalls) -> Iterator[None]:
    """Inside, attention kernels return what they returned when `calls` was filled, and are not run."""
    with _Replaying(calls):
        yield
    if calls:
        raise RuntimeError(f"a branch that runs again calls {calls[0].kernel} less often than in forward; {_REMEDY}")


class _Saving(TorchDispatchMode):
    def __init__(self, calls: KernelCalls) -> None:
        super().__init__()
        self._calls = calls
        self._kernels: dict[int, OpOverload] = {}
        """Address of the storage of a saved output -> the kernel that it is from."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if self._kernels and func._schema.is_mutable:
            for tensor in _written(func, args, kwargs or {}):
                kernel = self._kernels.get(tensor.untyped_storage()._cdata)
                if kernel is not None:
                    raise RuntimeError(f"a branch writes to what {kernel} returned; set saved_attention to 0")
        if not _is_saved(func, args, kwargs):
            return func(*args, **(kwargs or {}))
        if func is _EFFICIENT:
            # Without a gradient the kernel is asked to leave its row sums out. They do not change its output.
            args = (*args[:_WITH_SUMS], True, *args[_WITH_SUMS + 1 :])
        outputs = func(*args, **(kwargs or {}))
        self._calls.append(KernelCall(func, _aliases(outputs)))
        self._kernels[outputs[0].untyped_storage()._cdata] = func
        return outputs


class _Replaying(TorchDispatchMode):
    def __init__(self, calls: KernelCalls) -> None:
        super().__init__()
        self._calls = calls

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if not _is_saved(func, args, kwargs):
            return func(*args, **(kwargs or {}))
        if not self._calls:
            raise RuntimeError(f"a branch that runs again calls {func} once more than in forward; {_REMEDY}")
        call = self._calls.popleft()
        # The last axes may differ: that of queries is their width, that of the output is the width of the values.
        if call.kernel is not func or call.outputs[0].shape[:-1] != args[0].shape[:-1]:
            raise RuntimeError(
                f"a branch that runs again calls {func} on queries of shape {tuple(args[0].shape)}, where forward "
                f"called {call.kernel} with an output of shape {tuple(call.outputs[0].shape)}; {_REMEDY}"
            )
        return _aliases(call.outputs)


_REMEDY = (
    "its attention has another kernel where a gradient is wanted (a mask that is trained?), or it is no function of "
    "its input alone: set saved_attention to 0, or leave it outside of the run"
)


def _written(func: Any, args: tuple, kwargs: dict) -> Iterator[Tensor]:
    """The arguments that `func` writes to."""
    for place, argument in enumerate(func._schema.arguments):
        if argument.is_write:
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            yield from (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor))


def _is_saved(func: Any, args: tuple, kwargs: dict | None) -> bool:
    place = _DROPOUT.get(func)
    if place is None:
        return False
    rate = args[place] if len(args) > place else (kwargs or {}).get("dropout_p", 0.0)
    return rate == 0.0


def _aliases(outputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same memory in tensors of their own, as autograd gives the ones that it gets a history."""
    return tuple(output.detach() if isinstance(output, Tensor) else output for output in outputs)
