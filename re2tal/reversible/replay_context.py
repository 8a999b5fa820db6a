"""The context that a replayed branch must see, besides its input and random draws: autocast, kernels and buffers.

Backward runs a branch under the autocast state of its forward, wherever `backward` is called. Buffers that training
writes, such as the running statistics of a normalisation, must not be updated a second time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class AutocastState:
    """Whether, and to what, operations on a device type and on the CPU are cast."""

    enabled: tuple[tuple[str, torch.dtype, bool], ...]
    """(device type, dtype, on)"""

    @classmethod
    def now(cls, device: torch.device) -> AutocastState:
        """The present state."""
        kinds = dict.fromkeys((device.type, "cpu"))
        return cls(tuple((kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)) for kind in kinds))

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Inside, autocast is as it was recorded.

        Its cache of cast weights is off. A branch uses each weight once, and if two branches shared one, the second
        would find it in the cache with the graph of the first, which is freed already.
        """
        with ExitStack() as stack:
            for kind, dtype, enabled in self.enabled:
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False))
            yield


@contextmanager
def same_kernels() -> Iterator[None]:
    """Inside, kernels are not chosen by whether a gradient is wanted: the replay wants one, the forward does not.

    cuDNN's attention has different plans for inference and training, and `nn.MultiheadAttention` and
    `nn.TransformerEncoderLayer`
    have a fast path for inference. Other kernels are chosen by shapes, dtypes and flags, which are the same both times.
    """
    cudnn, fast_path = torch.backends.cuda.cudnn_sdp_enabled(), torch.backends.mha.get_fastpath_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        torch.backends.mha.set_fastpath_enabled(fast_path)


class BufferWatch:
    """Finds the buffers of a module that were written since the watch was made."""

    def __init__(self, owner: nn.Module | None) -> None:
        modules = [] if owner is None else [(module, list(module.buffers(recurse=False))) for module in owner.modules()]
        self._versions = [(module, [buffer._version for buffer in own]) for module, own in modules if own]

    def written(self) -> list[Tensor]:
        """All buffers of every module of which at least one was written.

        Of a BatchNorm only `num_batches_tracked` shows it: its kernel writes the statistics without counting a version.
        """
        return [
            buffer
            for module, versions in self._versions
            if versions != [own._version for own in module.buffers(recurse=False)]
            for buffer in module.buffers(recurse=False)
        ]


@contextmanager
def held(buffers: Sequence[Tensor]) -> Iterator[None]:
    """Restores `buffers` to their present values at the end."""
    before = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)
