"""Flags and ranges of a configuration's fields, in addition to type and default.

    workers: int = option(2, resumable=True)
    names_with(run, "resumable")                    -> name, data.shards, data.clips.workers, ...

A field without a value for a flag inherits it from the field that holds its configuration.

    channels: int = option(256, within=COUNT)      check_ranges(self, "localizer")      in __post_init__
    check_options(self, seed=NOT_NEGATIVE)                              the same for options of a command
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, field, fields, is_dataclass
from typing import Any, Literal, NamedTuple, TypeVar

T = TypeVar("T")


class Range(NamedTuple):
    """Which numbers a field takes."""

    accepts: Callable[[float], bool]
    words: str
    """What to give, for the error."""


FINITE = Range(math.isfinite, "a finite number")
COUNT = Range(lambda value: 1 <= value < math.inf, "1 or more")
NOT_NEGATIVE = Range(lambda value: 0 <= value < math.inf, "0 or more")
POSITIVE = Range(lambda value: 0 < value < math.inf, "a positive number")
SHARE = Range(lambda value: 0 <= value <= 1, "a number from 0 to 1")
RATE = Range(lambda value: 0 <= value < 1, "a number from 0 to below 1")
INSIDE = Range(lambda value: 0 < value < 1, "a number between 0 and 1")


def check_ranges(config: Any, part: str, **ranges: Range) -> None:
    """Raises ValueError for a field that is outside the range that it was declared `within`, or that is given here;
    None is inside. `part` is where `config` stands."""
    declared = {one.name: one.metadata["within"] for one in fields(config) if "within" in one.metadata}
    for name, one in (declared | ranges).items():
        check(f"{part}.{name}", getattr(config, name), one)


def check_options(options: Any, **ranges: Range) -> None:
    """The same for fields that are options of a command, called as they are there."""
    for name, one in ranges.items():
        check(f"--{name.replace('_', '-')}", getattr(options, name), one)


def check(name: str, value: float | tuple[float, ...] | None, one: Range) -> None:
    """Raises ValueError for a number, or one of several, outside its range; None is inside."""
    for number in value if isinstance(value, tuple) else () if value is None else (value,):
        if not one.accepts(number):
            raise ValueError(f"{name} is {number}; give {one.words}")


Flag = Literal["resumable", "planned", "wiring", "of_rewired"]


_NONE: Any = MISSING


def option(
    default: T = _NONE,
    *,
    default_factory: Callable[[], T] = _NONE,
    within: Range | None = None,
    resumable: bool | None = None,
    planned: bool | None = None,
    wiring: bool | None = None,
    of_rewired: bool | None = None,
) -> T:
    """As `dataclasses.field`, with flags; None inherits a flag from the field that holds the configuration.

    Args:
        default: the default value
        default_factory: makes the default, where the field is itself a configuration
        within: which numbers it takes, for `check_ranges`
        resumable: it may change when a run is resumed: the steps to come may take another value, or no step depends on
            it (but for the rounding of a new plan)
        planned: the plan of a step's memory depends on it
        wiring: it changes the function that a rewired network computes with the same weights
        of_rewired: it would be ignored, without a word, where the backbone is not rewired
    """
    flags = {"within": within, "resumable": resumable, "planned": planned, "wiring": wiring, "of_rewired": of_rewired}
    metadata = {name: value for name, value in flags.items() if value is not None}
    made: Any = field(default=default, default_factory=default_factory, metadata=metadata)  # type: ignore[call-overload]
    return made


def names_with(config: Any, flag: Flag, *, inherited: bool = False) -> Iterator[str]:
    """Dotted names of the plain values in `config` that have `flag`, in their order; `inherited` is the flag of the
    field that holds `config`."""
    for one in fields(config):
        value, flagged = getattr(config, one.name), one.metadata.get(flag, inherited)
        if is_dataclass(value):
            yield from (f"{one.name}.{name}" for name in names_with(value, flag, inherited=flagged))
        elif flagged:
            yield one.name


def defaults_of(config: Any) -> Iterator[tuple[str, Any]]:
    """Dotted names and default values of the plain fields in `config` that have a default."""
    for one in fields(config):
        value = getattr(config, one.name)
        if is_dataclass(value):
            yield from ((f"{one.name}.{name}", default) for name, default in defaults_of(value))
        elif one.default is not MISSING:
            yield one.name, one.default


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested JSON values -> ("data.clips.size", 224), ... in their order."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
