"""Which branches have kinks: places where their slope jumps, as that of ReLU does at 0.

An error in a state, however small, carries some element across such a place, and the gradient jumps with it. That is
why `grid="auto"` rounds the states of these branches in float32 too; see `reversible.precision`. A type of block says
so where it is registered (`Branch.kinks`), or shows it by the layers that it holds. Of a block that is taken apart,
`KinkFinder` sees the operations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.pooling import _AdaptiveMaxPoolNd, _MaxPoolNd
from torch.utils._python_dispatch import TorchDispatchMode

# Leaky, parametric and randomised ReLU and the hard functions included; nn.ReLU6 is an nn.Hardtanh.
LAYERS = (
    *(nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.Threshold, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid),
    *(nn.Hardshrink, nn.Softshrink, nn.SELU, _MaxPoolNd, _AdaptiveMaxPoolNd),
)

# By parts of their names.
OPERATIONS = ("relu", "threshold", "hardtanh", "hardswish", "hardsigmoid", "shrink", "max_pool")
# By their names; in numbers, as those of positions and masks are no states.
CHOICES = (
    *("abs", "sign", "round", "maximum", "minimum", "fmax", "fmin", "amax", "amin", "aminmax", "max", "min", "argmax"),
    *("argmin", "topk", "sort", "kthvalue", "median", "cummax", "cummin"),
)
# At 0 alone: other clamps mostly guard a division, far from where they bend; drop path compares with its probability.
AT_ZERO = ("clamp", "clamp_min", "clamp_max", "gt", "ge", "lt", "le")


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
        name = func.overloadpacket.__name__
        self.found |= any(part in name for part in OPERATIONS)
        if args and isinstance(args[0], Tensor) and args[0].is_floating_point():
            name, bounds = name.removesuffix("_"), (*args[1:], *(kwargs or {}).values())
            at_zero = any(type(bound) in (int, float) and bound == 0 for bound in bounds)
            self.found |= name in CHOICES or (name in AT_ZERO and at_zero)
        return func(*args, **(kwargs or {}))
