"""The coupling of residual branches whose skips reach one and two states back; its inverse, gradients and errors.

    advance    x[i+1] = F_i(x[i]) + alpha x[i] + beta x[i-1],    x[-1] = x[0] = x
    rewind     x[i-1] = (x[i+1] - F_i(x[i]) - alpha x[i]) / beta
    gradients  dx[i]  = dF_i(x[i])^T dx[i+1] + alpha dx[i+1] + beta dx[i+2]:    the first line again, walking backwards

Kernels. One step reads and writes the state once, in place, in each of three directions:

    forward, inverse   x[i-1] +- round(F_i(x[i])): `add_rounded` fuses converting, rounding to the grid and adding, by
                       doing all three block by block, in one buffer that stays in the processor's cache; a state that
                       is no larger than two blocks is rounded as a whole
    gradient           dx[i+2] += dF_i^T dx[i+1]: one kernel; rounding hands gradients on as they are

Without a grid, forward and inverse are one kernel too. It is F_i that is rounded, not the sum: rounding x[i-1] + F_i
would need no buffer, but has no inverse, because 0 + 1/2 and -1 + 1/2 are both rounded to 0. What this buys is
measured by benchmarks/coupling.py.

(0, 1) is Re2TAL's, whose inverse neither multiplies nor divides. (1, 0) is the residual network before it was rewired,
which cannot be inverted. Dr2Net (CVPR 2024) trains along the way from there to here.

What a run of n branches returns. Where alpha + beta = 1, the recurrence says
x[i+1] + beta x[i] = F_i(x[i]) + (x[i] + beta x[i-1]), so that x[n] + beta x[n-1] = (1 + beta) x + F_0 + .. + F_n-1, and

    "mean"         (x[n] + beta x[n-1]) / (1 + beta)    = x + (F_0 + .. + F_n-1) / (1 + beta)
    "extrapolate"   x[n] + beta (x[n-1] - x)            = x + (F_0 + .. + F_n-1)

Both are x[n] at (1, 0), where that is the plain network, and the two merges of Re2TAL's coupling at (0, 1); in between
they change smoothly, and "extrapolate" has every branch in full measure all the way. Their gradients have dx[n+1] =
dx[n], as the forward has x[-1] = x[0]. Away from alpha + beta = 1 states grow or shrink by (alpha + sqrt(alpha^2 + 4
beta)) / 2 a step.

Rebuilding. An error in a state goes on as e[i-1] = (e[i+1] - alpha e[i]) / beta, the branches left aside, so k inverses
in a row multiply it by up to mu^k, mu = (alpha + sqrt(alpha^2 + 4 beta)) / (2 beta), which is 1 / beta where alpha +
beta = 1. A run therefore keeps pairs of states at such distances that no rebuilt one is off by more than mu^k allows:
all of its states for a small beta, which makes it a checkpointed run with exact gradients, only the last pair for one
near 1, and a few pairs in between.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import floor, inf, log, sqrt
from typing import Literal

import torch
from torch import Tensor

from re2tal.reversible.fake import is_counted

Merge = Literal["mean", "extrapolate"]

BLOCK_ELEMENTS = {"cpu": 2**20, "cuda": 2**22}
"""Of a state that are rounded and added at a time: 4 and 16 MiB stay in the last cache of a CPU and of a GPU."""


@dataclass(frozen=True, slots=True)
class Coupling:
    """The weights with which the last two states enter the next one, besides the branch's output."""

    alpha: float = 0.0
    """Of x[i], in [0, 1]."""
    beta: float = 1.0
    """Of x[i-1], in [0, 1]."""

    def __post_init__(self) -> None:
        for name, value in (("alpha", self.alpha), ("beta", self.beta)):
            if not 0 <= value <= 1:
                raise ValueError(f"coupling: {name} is {value}; it lies in [0, 1]: (0, 1) is Re2TAL's, (1, 0) is plain")

    @property
    def is_sum(self) -> bool:
        """Whether this is Re2TAL's coupling: a plain sum, which is exact on a grid, and so is its inverse."""
        return self.alpha == 0 and self.beta == 1

    # ------------------------------------------------------------------------------------------------- there and back

    def advance(self, previous: Tensor, current: Tensor, update: Tensor, *, owned: bool) -> Tensor:
        """x[i-1], x[i], F_i(x[i]) -> x[i+1]; overwrites x[i-1] if `owned`.

        `update` may have a narrower dtype than the states; the sum is computed in theirs, without a copy of `update`.
        """
        if self.is_sum and not owned:
            return previous + update
        return self.carried(previous, current, owned=owned).add_(update)

    def carried(self, previous: Tensor, current: Tensor, *, owned: bool) -> Tensor:
        """alpha x[i] + beta x[i-1], to which the caller adds F_i(x[i]) in place; overwrites x[i-1] if `owned`."""
        if self.is_sum:
            return previous if owned else previous.clone()
        if self.beta == 0:
            # A new tensor, even where alpha is 1: the caller adds to it, and x[i] is still needed.
            return current * self.alpha
        carried = previous.mul_(self.beta) if owned else previous * self.beta
        return carried.add_(current, alpha=self.alpha)

    def released(self, carried: Tensor, current: Tensor) -> Tensor:
        """The inverse of `carried`, in place: x[i+1] - F_i(x[i]) and x[i] -> x[i-1]."""
        return carried if self.is_sum else carried.sub_(current, alpha=self.alpha).div_(self.beta)

    # ------------------------------------------------------------------------------------------------ the ends of a run

    def merged(self, start: Tensor, previous: Tensor, current: Tensor, *, merge: Merge) -> Tensor:
        """x, x[n-1] and x[n] -> the output of the run."""
        if self.beta == 0:
            return current
        if self.is_sum:
            total = previous + current
            return total.mul_(0.5) if merge == "mean" else total.sub_(start)
        if merge == "mean":
            return (current + self.beta * previous) / (1 + self.beta)
        return current + self.beta * (previous - start)

    def gradient_of_end(self, gradient: Tensor, *, merge: Merge) -> Tensor:
        """The gradient of the output -> dx[n], which equals dx[n+1]."""
        return gradient if merge == "extrapolate" or self.beta == 0 else gradient * (1 / (1 + self.beta))

    def gradient_of_start(self, second: Tensor, first: Tensor, gradient: Tensor | None, *, merge: Merge) -> Tensor:
        """Gradient of x from dx[2] (`second`), dx[1] (`first`) and the output's gradient; the caller adds F_0's part.

        x enters the run as x[0], as x[-1], and in the "extrapolate" merge. A "mean" does not use `gradient`.
        """
        # In the order in which plain autograd adds, to agree with it to the last bit.
        back = second - gradient if merge == "extrapolate" and gradient is not None else second
        if self.is_sum:
            return back + first
        return (back * self.beta).add_(first, alpha=self.alpha + self.beta)

    # ----------------------------------------------------------------------------------------------------------- errors

    @property
    def error_growth(self) -> float:
        """mu: the largest factor by which one inverse multiplies an error; infinite for beta = 0."""
        if self.beta == 0:
            return inf
        return (self.alpha + sqrt(self.alpha**2 + 4 * self.beta)) / (2 * self.beta)

    def saved_states(self, length: int, *, room: float) -> list[int]:
        """Indices of the states 0 .. `length` that a run saves for its backward, in rising order.

        `room`: the factor by which the error of a state may grow. Under Re2TAL's coupling no error grows, and only the
        last two states are saved.
        """
        in_a_row = self._in_a_row(room)
        # Counted from the end: a pair that is saved, then `in_a_row` states that are rebuilt. For length 6 and 2 in a
        # row: [1, 2, 5, 6].
        saved = [index for index in range(length + 1) if in_a_row is None or (length - index) % (in_a_row + 2) < 2]
        if in_a_row is None:
            saved = saved[-2:]
        # Backward needs x[n] only to rebuild x[n-2].
        return saved[:-1] if length == 1 or length - 2 in saved else saved

    def _in_a_row(self, room: float) -> int | None:
        """How many inverses in a row keep the growth of an error within `room`; None for any number."""
        if self.is_sum:
            return None
        if room < 1 or self.beta == 0:
            return 0
        return None if self.error_growth <= 1 else floor(log(room) / log(self.error_growth))


SUM = Coupling()
"""Re2TAL's: x[i+1] = x[i-1] + F_i(x[i])."""


def add_rounded(state: Tensor, update: Tensor, *, offset: float, sign: int) -> Tensor:
    """state + sign ((update + offset) - offset), in place; `update` may have a narrower dtype."""
    if state.numel() <= 2 * _block_elements(state):
        # It stays in the cache as a whole: blocks would only be more calls.
        wide = update.to(state.dtype)
        rounded = (wide + offset if wide is update else wide.add_(offset)).sub_(offset)
        return state.add_(rounded, alpha=sign)
    blocks = _blocks(state, update)
    buffer = state.new_empty(max(block.numel() for block, _ in blocks))
    # One block stands for all where only bytes are counted.
    for block, change in blocks[:1] if is_counted(state) else blocks:
        rounded = buffer[: block.numel()].view(block.shape)
        if change.dtype == state.dtype:
            torch.add(change, offset, out=rounded)
        else:
            rounded.copy_(change).add_(offset)
        block.add_(rounded.sub_(offset), alpha=sign)
    return state


def _blocks(state: Tensor, update: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Views of the same places of both, each of about BLOCK_ELEMENTS, in the order in which `state` lies in memory."""
    order = sorted(range(state.ndim), key=state.stride, reverse=True)
    pair = [state.permute(order), update.permute(order)]
    if all(one.is_contiguous() for one in pair):
        pair = [one.view(-1) for one in pair]
    axis = next((axis for axis, length in enumerate(pair[0].shape) if length > 1), 0)
    rows = max(1, _block_elements(state) * pair[0].shape[axis] // max(1, state.numel()))
    return list(zip(*(one.split(rows, axis) for one in pair), strict=True))


def _block_elements(state: Tensor) -> int:
    return BLOCK_ELEMENTS.get(state.device.type, BLOCK_ELEMENTS["cuda"])
