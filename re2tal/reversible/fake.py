"""Networks without numbers: shapes, dtypes and devices alone, so that a step of any size runs in seconds, in no memory.

    module, mode = on_fake_tensors(build, dtype=torch.bfloat16, device=device)
    with mode, LiveBytes() as live:
        module(torch.empty(1, 3, 768, 224, 224, dtype=torch.bfloat16, device=device)).sum().backward()

Which tensors a kernel saves depends on the device, so take the one to train on; torch must have been built for it.

A loop over equal parts takes and gives back the same in every round. Asking `is_counted`, it may leave out rounds that
change neither the peak nor what is left.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

Module = TypeVar("Module", bound=nn.Module)


class _CountingMode(FakeTensorMode):
    """One in which nothing but bytes is wanted. Compilers have modes of their own, in which every operation counts."""


def is_counted(tensor: Tensor) -> bool:
    """Whether `tensor` was made in the mode of `on_fake_tensors`."""
    return isinstance(tensor, FakeTensor) and isinstance(tensor.fake_mode, _CountingMode)


def on_fake_tensors(
    build: Callable[[], Module], *, dtype: torch.dtype, device: torch.device
) -> tuple[Module, FakeTensorMode]:
    """What `build` builds, with fake parameters and buffers of `dtype` on `device`, and the mode to run it in.

    `build` must read no weights: it runs where tensors have no numbers (torch's meta device). Constants that the
    network makes on the way may be real; they are taken for fake ones.
    """
    with torch.device("meta"):
        module = build().to(dtype)
    mode = _CountingMode(allow_non_fake_inputs=True)
    with mode:
        module.to_empty(device=device)
    return module, mode
