"""In what numbers a run computes: the dtype of its states and branches, and the grid that makes rebuilding exact.

A state rebuilt by x[i-1] = x[i+1] - F_i(x[i]) is off by a rounding of float32. Branches in float32 hardly notice, but
where they compute in bfloat16 or float16 such an error flips roundings inside, and that compounds: without a grid the
first branch's gradient is 5 % off after 24 transformer blocks. On a grid the sums are exact, and nothing is ever off:

    update = (update + c) - c,  c = 1.5 * step / eps     rounds to multiples of `step` where |update| < 2**22 step
    x[i-1] + update                                      is exact where |x[i+1]| < 2**24 step

(for float32; beyond 2**22 step, numbers that were bfloat16 or float16 are such multiples by themselves). With the step
of 2**-14 the bounds are 256 and 1024; an element beyond them is rebuilt with the error of a rounding, as it would be
without a grid. The gradient of `(update + c) - c` is the identity: a straight-through estimate, at no cost.

Only Re2TAL's coupling is a sum. Others multiply states by fractions, which leaves every grid, so they have none; and
where branches compute in narrow numbers, all of their states are kept (`Precision.room`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from re2tal.reversible.coupling import SUM, Coupling

GRID_STEP = 2.0**-14
NARROW = (torch.bfloat16, torch.float16)

Grid = float | Literal["auto"] | None
"""The step of the grid, "auto" for 2**-14 where branches compute in bfloat16 or float16, None for no grid."""


@dataclass(frozen=True, slots=True)
class Precision:
    """Dtypes of one run, and the step of its grid."""

    states: torch.dtype
    """x[i]: never narrower than float32, because a narrow state cannot be rebuilt."""
    branches: torch.dtype
    """What a branch is given, and the widest it may return."""
    output: torch.dtype
    """What the run returns."""
    grid: float | None
    """Branch outputs and the first state are rounded to multiples of this."""
    inside: torch.dtype
    """What branches compute in."""

    @classmethod
    def of(cls, x: Tensor, grid: Grid, coupling: Coupling = SUM) -> Precision:
        """For a run that starts with `x`, under the autocast state that is now in force."""
        autocast = torch.is_autocast_enabled(x.device.type)
        states = torch.float32 if x.dtype in NARROW else x.dtype
        branches = states if autocast else x.dtype
        if grid == "auto":
            grid = GRID_STEP if x.dtype in NARROW or (autocast and states == torch.float32) else None
        if grid is not None and not grid > 0:
            raise ValueError(f"grid is {grid}; give a positive step such as 2**-14, 'auto', or None for no grid")
        inside = torch.get_autocast_dtype(x.device.type) if autocast and states == torch.float32 else branches
        return cls(states, branches, branches, grid if coupling.is_sum else None, inside)

    @property
    def room(self) -> float:
        """By how much the error of a state may grow while states are rebuilt, if no grid makes it 0.

        Three bits may be lost: gradients then stay within 1e-5 in float32. But an error of any size flips roundings of
        branches that compute in narrow numbers, and is as large as these at once: then there is no room at all.
        """
        return 2**3 * torch.finfo(self.states).eps / torch.finfo(self.inside).eps

    def round(self, values: Tensor) -> Tensor:
        """To the grid, in the dtype of the states; `values` itself where there is no grid."""
        if self.grid is None:
            return values
        offset = 1.5 * self.grid / torch.finfo(self.states).eps
        state = values.to(self.states)
        return (state + offset if state is values else state.add_(offset)).sub_(offset)
