"""Which branches have kinks: places where their slope jumps, as that of ReLU does at 0.

An error in a state, however small, carries some element across such a place, and the gradient jumps with it. That is
why `grid="auto"` rounds the states of these branches in float32 too; see `reversible.precision`. A type of block says
so where it is registered (`Branch.kinks`), or shows it by the layers that it holds. Of a block that is taken apart,
`KinkFinder` sees the operations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.nn.modules.pooling import _AdaptiveMaxPoolNd, _MaxPoolNd
from torch.utils._python_dispatch import TorchDispatchMode

# Leaky, parametric and randomised ReLU and the hard functions included; nn.ReLU6 is an nn.Hardtanh.
LAYERS = (
    *(nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.Threshold, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid),
    *(nn.Hardshrink, nn.Softshrink, nn.SELU, _MaxPoolNd, _AdaptiveMaxPoolNd),
)

# By parts of their names. Clamps are left out: they mostly guard a division, far from where they bend.
OPERATIONS = ("relu", "threshold", "hardtanh", "hardswish", "hardsigmoid", "shrink", "max_pool")


def holds_kinks(block: nn.Module) -> bool:
    """Whether a layer inside `block` has kinks."""
    return any(isinstance(layer, LAYERS) for layer in block.modules())


class KinkFinder(TorchDispatchMode):
    """While it is entered: `found` becomes True with the first operation that has kinks."""

    def __init__(self) -> None:
        super().__init__()
        self.found = False

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Runs `func`, and looks at its name."""
        self.found |= any(part in func.overloadpacket.__name__ for part in OPERATIONS)
        return func(*args, **(kwargs or {}))
