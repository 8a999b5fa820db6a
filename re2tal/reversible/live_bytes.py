"""Counts the bytes that are alive, storage by storage, on any device and on fake tensors too.

    with LiveBytes() as live:
        step()
    live.peak            # the most that were alive at once, of what `step` made

Under a `FakeTensorMode` nothing is computed and nothing allocated, so that the peak of a step too large for this
machine is counted in seconds. What a kernel takes and gives back inside is not seen, nor what an allocator rounds up.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operations make inside, while they live.

    Enter it last: inside a `FakeTensorMode`, not around it.
    """

    live: int
    """Bytes alive now."""
    peak: int
    """The most that were alive at once; set it to `live` to begin anew."""

    def __init__(self, device: torch.device | None = None) -> None:
        """Counts what lies on devices of the kind of `device`; None counts everything."""
        super().__init__()
        self._kind = None if device is None else device.type
        self.live = self.peak = 0
        self._known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Runs the operation and counts what it returned that it was not given; meta tensors hold nothing."""
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:  # two calls in three, on fake tensors, which know it by themselves
            (tensor,) = args
            knows = isinstance(tensor, FakeTensor) and not tensor.fake_mode.in_kernel_invocation
            return tensor.fake_device if knows else func(*args)
        result = func(*args, **kwargs)
        given = {tensor.untyped_storage()._cdata for tensor in _tensors((args, kwargs))}
        for tensor in _tensors(result):
            if tensor.device.type == "meta" or self._kind not in (None, tensor.device.type):
                continue
            if tensor.untyped_storage()._cdata not in given:
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known and self._known[key]() is not None:
            return

        def gone(_: weakref.ref) -> None:
            self.live -= size

        self._known[key] = weakref.ref(storage, gone)
        self.live += size
        self.peak = max(self.peak, self.live)


def _tensors(values: Any) -> Iterator[Tensor]:
    """Those among the arguments or results of an operation, several times faster than pytrees tell them."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from _tensors(value)
    elif isinstance(values, dict):
        yield from _tensors(list(values.values()))
