"""The context that a replayed branch must see, besides its input, random draws and buffers: autocast and kernels.

Backward runs a branch under the autocast state of its forward, wherever `backward` is called.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch


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

    cuDNN's attention has different plans for inference and training. `nn.MultiheadAttention` and
    `nn.TransformerEncoderLayer` have a fast path for inference. Other kernels are chosen by shapes, dtypes and flags,
    which are the same both times. One is not: on a CPU, attention with a mask that wants a gradient has a kernel of its
    own, which no flag chooses for the forward. Under bfloat16 its rounding differs.
    """
    cudnn, fast_path = torch.backends.cuda.cudnn_sdp_enabled(), torch.backends.mha.get_fastpath_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        torch.backends.mha.set_fastpath_enabled(fast_path)
