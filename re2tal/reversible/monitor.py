"""Checks, every N steps, that backward rebuilds the states of forward, and that states stay in the grid's exact range.

    forward     samples a few thousand elements of a run's first state, at fixed places
    backward    samples the rebuilt first state at the same places:  drift = |rebuilt - original| / |original|
                (of an original that is 0, relative to the largest state)

The first state is rebuilt last, so it collects the errors of all others. On a grid the drift is 0, unless a kernel does
not repeat bit for bit, or a state is beyond the grid's exact range. To detect the latter, a sample of every state is
compared with that range. There, hashes of the whole first two states are compared too. Sums on a grid can be undone, so
one bit that flips in any state, in forward or backward, changes one of the two. Only what the first branch gave in
forward is not rebuilt, and not seen.
"""

from __future__ import annotations

import logging
from dataclasses import astuple, dataclass, field
from functools import lru_cache
from math import isnan

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from re2tal.reversible.precision import StateFormat

NUM_SAMPLES = 4096
DRIFT_LIMIT = 1e-4
"""Float32 states without a grid stay far below this at any depth. With narrow branches and no grid they exceed it."""
REPEAT_LIMIT = 1e-2
"""Roundings stay below this with any numbers. Above it, something else was computed."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Reading:
    """The figures of one step."""

    drift: float
    """Relative error of the rebuilt first state of a run; the largest of all runs."""
    outside: float
    """Share of elements of states beyond the range in which the grid makes sums exact; the largest of all runs."""
    largest: float = field(default=0.0, compare=False)
    """Element of any state; only of the first step, and where there is a grid."""
    growth: float = field(default=1.0, compare=False)
    """The norm of the largest state, relative to the first."""
    changed: bool = field(default=False, compare=False)
    """Whether, on a grid, any bit of the first two states was rebuilt as another."""

    def or_worse(self, other: Reading | None) -> Reading:
        """The worse of each figure."""
        pairs = zip(astuple(self), astuple(other or self), strict=True)
        return Reading(*(max(mine, its) for mine, its in pairs))


class Monitor:
    """Checks the runs of one stage in every `every`-th step, and warns once of each kind of trouble."""

    def __init__(self, name: str, *, every: int) -> None:
        """`name` is for the warnings."""
        self.name = name
        self.every = every
        self.reading: Reading | None = None
        """Of the last step that was checked."""
        self._steps = self._noted = 0
        self._warned: set[str] = set()

    def step(self) -> None:
        """Call it at the start of every forward of the stage that may have a backward."""
        self._steps += 1

    def observe(self, x: Tensor, precision: StateFormat) -> Observation | None:
        """An observation of the run that starts with `x`; None if this step is not checked, or `x` has no values."""
        due = self._steps > 0 and self._steps % self.every == 0 and x.numel() > 0
        return Observation(self, self._steps, precision) if due and not isinstance(x, FakeTensor) else None

    def note(self, reading: Reading, *, step: int, precision: StateFormat) -> None:
        """Takes the figures of one run of a checked step, after its backward, and warns if they are bad."""
        self.reading = reading.or_worse(self.reading if self._noted == step else None)
        self._noted = step
        self._warn_of_drift(reading, precision)
        if reading.outside > 0:
            self._warn(
                "range",
                f"has {reading.outside:.1%} of its states beyond {precision.exact_range:.0f}, up to which its grid of "
                f"{precision.grid:g} is exact; set grid to a larger step, or states to 'int32'",
            )

    def _warn_of_drift(self, reading: Reading, precision: StateFormat) -> None:
        if reading.drift > DRIFT_LIMIT:
            remedy = (
                "kernels that do not repeat bit for bit, or states outside of the grid: see the other warnings, and "
                "torch.use_deterministic_algorithms"
                if precision.grid is not None
                else "states that are not on a grid: set grid to 'auto' or a step, or states to 'int32'"
            )
            self._warn(
                "drift",
                f"rebuilds its first state with a relative error of {reading.drift:.1e}, and gradients are off by "
                f"more; it comes from {remedy}; or merge more often, by `segment`",
            )
        elif reading.changed:
            self._warn(
                "bits",
                f"does not rebuild its first states to the bit: a kernel does not repeat, a state is beyond "
                f"{precision.exact_range:.0f}, or a bit flipped in memory or on the device. The first two come again; "
                "where this does not, test the machine",
            )

    def _warn(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            logger.warning("rewired stage %s %s", self.name or "without a name", message)


class FirstCheck(Monitor):
    """Checks the first step of a stage, and stops a network whose branches give something else when they run again."""

    def __init__(self, name: str) -> None:
        super().__init__(name, every=1)
        self.done = False
        self.monitor: Monitor | None = None
        """Of the stage: one that looks at every step is told of this one."""

    def note(self, reading: Reading, *, step: int, precision: StateFormat) -> None:
        """Raises RuntimeError where the first state was rebuilt with a larger error than its numbers explain."""
        # One that fails is not done: whoever catches the error must not train on unchecked.
        self.done = False
        self._check(reading, precision)
        self.done = True
        if self.monitor is not None and self.monitor.every == 1:
            self.monitor.note(reading, step=step, precision=precision)
        else:
            self._warn_of_drift(reading, precision)

    def _check(self, reading: Reading, precision: StateFormat) -> None:
        stage = f"rewired stage {self.name or 'without a name'}"
        if isnan(reading.drift):
            raise RuntimeError(
                f"{stage}: a state holds NaN or infinity in the first step: look at what the network is given and at "
                "its weights, or lower the scale of the loss"
            )
        if not reading.drift <= _explained(reading, precision):
            raise RuntimeError(
                f"{stage}: backward rebuilt a state that is {reading.drift:.1e} of its size off, so a branch gives "
                "something else when it runs again: it reads an attribute or a cache that it writes, draws from a "
                "generator of its own, its states overflow, its kernels do not repeat bit for bit (on a CPU, those of "
                "attention with a trained mask under bfloat16), or it computes in bfloat16 inside, on states without a "
                "grid (set grid to 2**-14); correct it, or set recompute=False"
            )
        if reading.drift > REPEAT_LIMIT:
            raise RuntimeError(
                f"{stage}: backward rebuilt a state that is {reading.drift:.1e} of its size off, because later states "
                f"are {reading.growth:.1e} times as large and their roundings hide it; set grid to a step such as "
                "2**-18 or states to 'int32', scale the input up, or set recompute=False"
            )


def _explained(reading: Reading, precision: StateFormat) -> float:
    """The drift that the numbers of a run explain: none on a grid, within its range; some roundings without one."""
    if precision.exact_range is not None:
        # What is beyond a quarter of the range, and is added to a state, may be a multiple of half a step only; sums of
        # such are exact below half the range.
        return 0.0 if 2 * reading.largest < precision.exact_range else REPEAT_LIMIT
    roundings = 2**10 * torch.finfo(precision.dtype).eps * max(1.0, reading.growth)
    return REPEAT_LIMIT if precision.jumps else roundings


class Observation:
    """Collects the figures of one run, from its forward to its backward."""

    def __init__(self, monitor: Monitor, step: int, precision: StateFormat) -> None:
        self._monitor, self._step, self._precision = monitor, step, precision
        self._first: Tensor | None = None
        self._outside: list[Tensor] = []
        self._largest: list[Tensor] = []
        self._norms: list[Tensor] = []
        self._hashes: list[Tensor] = []

    def see(self, index: int, state: Tensor) -> None:
        """Forward calls it with x[index], the last one too."""
        sample = self._precision.real(_sample(state))
        self._norms.append(sample.double().norm())
        if index == 0:
            self._first = sample
        if (limit := self._precision.exact_range) is not None:
            if index < 2:
                self._hashes.append(_hash(state))
            # The count stays on the device, so that forward does not wait for it.
            self._outside.append((sample.abs() >= limit).float().mean())
            if isinstance(self._monitor, FirstCheck) and state.is_floating_point():
                # Of all elements: one that a sample misses is enough to be rebuilt with an error.
                self._largest.append(torch.linalg.vector_norm(state, ord=torch.inf))

    def rebuilt(self, state: Tensor, following: Tensor | None) -> None:
        """Backward calls it with the rebuilt x[0], and x[1] if that was rebuilt."""
        assert self._first is not None
        error = (self._precision.real(_sample(state)) - self._first).double().norm()
        first, most = self._norms[0], torch.stack(self._norms).max()
        base = torch.where(first > 0, first, most).clamp_min(1e-30)
        nothing = [torch.zeros_like(error)]
        outside, largest = torch.stack(self._outside or nothing).mean(), torch.stack(self._largest or nothing).max()
        figures = error / base, outside.double(), largest.double(), most / base
        here = [_hash(one) for one in (state, following) if one is not None] if self._hashes else []
        changed = not all(map(torch.equal, here, self._hashes))
        drift, beyond, largest_element, growth = torch.stack(figures).tolist()
        reading = Reading(drift, beyond, largest_element, growth, changed)
        self._monitor.note(reading, step=self._step, precision=self._precision)


def _hash(state: Tensor) -> Tensor:
    """Of all elements, a number for every million; 0 and -0 are one."""
    return torch.stack([torch.hash_tensor(piece + 0).view(torch.int64) for piece in state.flatten().split(2**20)])


def _sample(state: Tensor) -> Tensor:
    """A copy of some elements; their places depend only on the number of elements."""
    return state.take(_places(state.numel(), state.device))


@lru_cache(maxsize=32)
def _places(num_elements: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(num_elements)
    return torch.randint(num_elements, (min(num_elements, NUM_SAMPLES),), generator=generator).to(device)
