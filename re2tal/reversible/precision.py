"""The numbers that a run computes with: dtypes of states and branches, and the grid that makes rebuilding exact.

A state rebuilt by x[i-1] = x[i+1] - F_i(x[i]) has an error of one float32 rounding. For smooth branches in float32
this does not matter. For two kinds of branches it does, however small the error is. Branches that compute in bfloat16,
float16 or TF32: the error flips roundings inside them, and that compounds (the first branch's gradient is 5 % off after
24 transformer blocks). Branches with kinks, such as ReLU's: the error turns units on or off (the gradient is 1 to 10 %
off in SlowFast-101, by chance). On a grid the sums are exact, so states are rebuilt to the last bit:

    update = (update + c) - c,  c = 1.5 * step / eps     rounds to multiples of `step` where |update| < 2**22 step
    x[i-1] + update                                      is exact where |x[i+1]| < 2**24 step

(for float32; beyond 2**22 step, numbers that were bfloat16 or float16 are such multiples by themselves). An element
beyond these bounds is rebuilt with a rounding error, as it would be without a grid. The gradient of
`(update + c) - c` is the identity: a straight-through estimate, at no cost.

               step      bounds       because
    narrow     2**-14    256, 1024    finer than what branches that compute in bfloat16 or float16 can tell apart
    kinks      2**-18     16,   64    rounding itself turns units on or off, as many as the step is coarse: this is as
                                      fine as three times the largest state seen in SlowFast-101 (20) allows

States are made of one of two types:

    "float32"     on the grid above if one of the two reasons holds, or if a step is given
    "int32"       counts of the step, so multiples of it up to 2**31 steps: with 2**-16 to 32768. Sums of integers wrap
                  around and are exact whatever they are, so nothing is ever rebuilt with an error, and a step may be
                  any number; but every state is converted for its branch. NaN and infinity become some integer: a
                  network that diverges shows it in its gradients, and no longer in its loss

Only Re2TAL's coupling is a sum. Others multiply states by fractions, which leaves every grid, so they have none, and
float32 in the place of int32; all of their states are kept where branches compute in narrow numbers, or in float32
with kinks (`Precision.room`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from re2tal.reversible.coupling import SUM, Coupling, add_rounded

GRID_STEP = 2.0**-14
KINKS_STEP = 2.0**-18
FIXED_STEP = 2.0**-16
NARROW = (torch.bfloat16, torch.float16)

GridStep = float | Literal["auto"] | None
"""The step of the grid, or None for no grid. "auto" is 2**-14 where branches compute in bfloat16 or float16, or may use
TF32, which in float32 on CUDA convolutions may by default; 2**-18 where they compute in full float32 and have kinks;
and else none. Of int32 states it is 2**-16, and there is always one."""

States = Literal["float32", "int32"]
"""What states are made of; float64 stays what it is as "float32"."""


@dataclass(frozen=True, slots=True)
class StateFormat:
    """Dtypes of one run, and the step of its grid."""

    dtype: torch.dtype
    """x[i]: never narrower than float32, because a narrow state cannot be rebuilt."""
    branches: torch.dtype
    """What a branch is given, and the widest it may return."""
    output: torch.dtype
    """What the run returns."""
    grid: float | None
    """Branch outputs and the first state are rounded to multiples of this."""
    inside: torch.dtype
    """What branches compute in."""
    gradients: torch.dtype
    """The gradients of states."""
    jumps: bool
    """Whether an error in a state, however small, may change a branch's output by much."""

    @classmethod
    def of(
        cls, x: Tensor, grid: GridStep, coupling: Coupling = SUM, *, states: States = "float32", kinks: bool = False
    ) -> StateFormat:
        """For a run that starts with `x`, under the autocast state that is now in force.

        `kinks`: whether the slope of branches jumps somewhere, as ReLU's does. In float64 it does not matter: an error
        is so small there that it turns no unit on or off.
        """
        check_numbers(states, grid)
        autocast = torch.is_autocast_enabled(x.device.type)
        wide = torch.float32 if x.dtype in NARROW else x.dtype
        # Autocast leaves float64 alone.
        inside = torch.get_autocast_dtype(x.device.type) if autocast and wide == torch.float32 else x.dtype
        branches = wide if autocast else x.dtype
        narrow = inside in NARROW or (inside == torch.float32 and _short_factors(x.device))
        jumps = narrow or (kinks and inside == torch.float32)
        if states == "int32" and coupling.is_sum:
            step = FIXED_STEP if grid == "auto" else grid
            return cls(torch.int32, branches, branches, step, inside, wide, jumps)
        if grid == "auto":
            grid = GRID_STEP if narrow else KINKS_STEP if jumps else None
        return cls(wide, branches, branches, grid if coupling.is_sum else None, inside, wide, jumps)

    @property
    def room(self) -> float:
        """The factor by which the error of a state may grow while states are rebuilt, if no grid makes it 0.

        Three bits may be lost: gradients then stay within 1e-5 in float32. But where an error of any size flips
        roundings inside branches, or turns units on or off, there is no room at all.
        """
        return 0.0 if self.jumps else 2.0**3

    @property
    def exact_range(self) -> float | None:
        """Below it, sums of states are exact; integers wrap around there. None where no grid makes them so."""
        if self.grid is None:
            return None
        # Of integers half of what there is: a sum that has wrapped around can no longer be told from another.
        return self.grid * (2 / torch.finfo(self.dtype).eps if self.dtype.is_floating_point else 2**30)

    def state(self, x: Tensor) -> Tensor:
        """Real numbers as a state."""
        return self.round(dense(x).to(self.dtype)) if self.dtype.is_floating_point else self._count(dense(x))

    def real(self, state: Tensor) -> Tensor:
        """A state, or a piece of one, in real numbers; itself where it is in such."""
        if state.is_floating_point():
            return state
        assert self.grid is not None
        return state.to(self.gradients).mul_(self.grid)

    def add(self, state: Tensor, update: Tensor, *, sign: int = 1) -> Tensor:
        """Adds F_i(x[i]), rounded, to `state` in place, or subtracts it; `update` is not rounded yet."""
        if torch.is_grad_enabled() or self.grid is None or not self.dtype.is_floating_point:
            return state.add_(self.increment(self.round(update)), alpha=sign)
        return add_rounded(state, update, offset=self._offset(self.grid), sign=sign)

    def increment(self, update: Tensor) -> Tensor:
        """A rounded update in the form that is added to a state: for integer states, its number of steps."""
        return update if self.dtype.is_floating_point else self._count(update)

    def round(self, values: Tensor) -> Tensor:
        """Rounds to the grid, in the states' dtype. Without a grid, and for integers, returns `values` itself."""
        if self.grid is None or not self.dtype.is_floating_point:
            return values
        offset = self._offset(self.grid)
        state = values.to(self.dtype)
        # In place only in a copy: where `to` had nothing to convert, `values` belongs to the branch.
        return (state + offset if state is values else state.add_(offset)).sub_(offset)

    def _offset(self, grid: float) -> float:
        # The middle of [step / eps, 2 step / eps), where neighbouring floats are `step` apart. There `update + c` is
        # rounded to a multiple of `step`, whichever sign `update` has.
        return 1.5 * grid / torch.finfo(self.dtype).eps

    def _count(self, values: Tensor) -> Tensor:
        assert self.grid is not None
        return (values.detach().to(self.gradients) / self.grid).round_().to(self.dtype)


def _short_factors(device: torch.device) -> bool:
    """Whether products in float32 round their factors: on CUDA to TF32, on a CPU to bfloat16.

    On CUDA convolutions do so unless somebody forbids it (`torch.backends.cudnn.allow_tf32 = False`), matrix products
    only if somebody asks for it (`torch.set_float32_matmul_precision`). A run does not know what its branches compute,
    so either flag counts. These names of the flags can be read whatever has set them; the older ones raise once these
    were used.
    """
    cuda, cpu = (torch.backends.cuda.matmul, torch.backends.cudnn.conv), (torch.backends.mkldnn.matmul,)  # type: ignore[attr-defined]
    return any(flag.fp32_precision in ("tf32", "bf16") for flag in {"cuda": cuda, "cpu": cpu}.get(device.type, ()))


def check_numbers(states: States, grid: GridStep) -> None:
    """Raises ValueError if either is unknown, or if the two exclude each other."""
    if states not in get_args(States):
        raise ValueError(f"unknown states {states!r}; known: {list(get_args(States))}")
    if grid not in ("auto", None) and not (isinstance(grid, float | int) and 0 < grid < 1):
        # From 1 on, rounding leaves little or nothing of what branches add. Who gives 14 means 2**-14.
        raise ValueError(
            f"grid is {grid}; give a positive step below 1 such as 2**-14 (6.1e-05), 'auto', or None for no grid"
        )
    if states == "int32" and grid is None:
        raise ValueError("int32 states count steps of a grid, and grid is None; give a step such as 2**-16, or 'auto'")


def dense(x: Tensor) -> Tensor:
    """Row by row, or with channels last: of a transposed view every branch would make a copy, and every sum be slow."""
    channels_last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.ndim)
    return x if channels_last and x.is_contiguous(memory_format=channels_last) else x.contiguous()
