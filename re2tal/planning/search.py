"""Picks one option for every stage of a step: the fastest combination within a number of bytes.

A step runs its stages forwards, then backwards; what a stage keeps lives from its forward to its backward:

    forward of s     ground.forward[s]  + kept[0] + .. + kept[s-1] + rise of s in forward
    between          ground.between     + kept[0] + .. + kept[S-1]
    backward of s    ground.backward[s] + kept[0] + .. + kept[s]   + rise of s in backward

No phase depends on later stages, so the search goes stage by stage and keeps only the partial choices that no other
one beats in both bytes kept and cost. The result is exact and deterministic.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter


@dataclass(frozen=True, slots=True)
class Option:
    """One way to run a stage."""

    seconds: float
    """Of its forward and backward."""
    kept: int
    """Bytes that live from its forward to its backward."""
    forward: int
    """Bytes alive at once in its forward, beyond those at its beginning."""
    backward: int
    """The same of its backward."""


@dataclass(frozen=True, slots=True)
class Ground:
    """Bytes alive whatever the stages choose."""

    before: int
    """Most before the first stage begins."""
    forward: tuple[int, ...]
    """When the forward of each stage begins, less what earlier stages keep."""
    between: int
    """Most between the last forward and the first backward, less what all stages keep."""
    backward: tuple[int, ...]
    """When the backward of each stage begins, less what it and earlier stages keep."""


@dataclass(frozen=True, slots=True)
class Choice:
    """One option for every stage."""

    options: tuple[int, ...]
    """Its number among the stage's options."""
    peak: int
    """Most bytes alive at once."""
    seconds: float
    """Of all stages."""


_SECONDS: Callable[[Choice], float] = attrgetter("seconds")


def fastest(ground: Ground, stages: Sequence[Sequence[Option]], *, budget: int) -> Choice | None:
    """The choice with the least time whose peak is at most `budget` bytes; None where there is none."""
    return min(_search(ground, stages, budget=budget, cost=_SECONDS), key=_SECONDS, default=None)


def smallest(ground: Ground, stages: Sequence[Sequence[Option]]) -> Choice:
    """The choice with the lowest peak, and the fastest among those."""
    # Twice: with the peak as the cost, the search finds the lowest, but not the fastest among those.
    lowest = min(choice.peak for choice in _search(ground, stages, budget=None, cost=attrgetter("peak")))
    choice = fastest(ground, stages, budget=lowest)
    assert choice is not None
    return choice


@dataclass(frozen=True, slots=True)
class _Partial(Choice):
    """The first stages decided."""

    kept: int


def _search(
    ground: Ground, stages: Sequence[Sequence[Option]], *, budget: int | None, cost: Callable[[_Partial], float]
) -> list[Choice]:
    partials = [_Partial((), ground.before, 0.0, 0)]
    for options in stages:
        extended = [
            _extended(ground, partial, number, option) for partial in partials for number, option in enumerate(options)
        ]
        partials = _undominated([one for one in extended if budget is None or one.peak <= budget], cost)
    found = [Choice(one.options, max(one.peak, ground.between + one.kept), one.seconds) for one in partials]
    return [choice for choice in found if budget is None or choice.peak <= budget]


def _extended(ground: Ground, partial: _Partial, number: int, option: Option) -> _Partial:
    s, kept = len(partial.options), partial.kept + option.kept
    forward = ground.forward[s] + partial.kept + option.forward
    backward = ground.backward[s] + kept + option.backward
    seconds = partial.seconds + option.seconds
    return _Partial((*partial.options, number), max(partial.peak, forward, backward), seconds, kept)


def _undominated(partials: Sequence[_Partial], cost: Callable[[_Partial], float]) -> list[_Partial]:
    """Those that no other one beats in both what it keeps and what it costs."""
    found: list[_Partial] = []
    # In this order a partial choice survives only if it costs less than all that keep no more. Peaks need no
    # comparison: each that is here is within the budget, or is the cost itself.
    for partial in sorted(partials, key=lambda one: (one.kept, cost(one), one.options)):
        if not found or cost(partial) < cost(found[-1]):
            found.append(partial)
    return found
