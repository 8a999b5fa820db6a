"""What a configuration's field says about itself beside its type and default; whoever needs such fields asks for them.

    workers: int = option(2, resumable=True)
    names_with(run, "resumable")                    -> name, data.shards, data.clips.workers, ...

A field that says nothing of a flag takes it from the field that its configuration stands in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import MISSING, field, fields, is_dataclass
from typing import Any, Literal, TypeVar, overload

T = TypeVar("T")

Flag = Literal["resumable", "planned", "wiring", "of_rewired"]


@overload
def option(
    default: T,
    *,
    resumable: bool | None = ...,
    planned: bool | None = ...,
    wiring: bool | None = ...,
    of_rewired: bool | None = ...,
) -> T: ...


@overload
def option(
    *,
    default_factory: Callable[[], T],
    resumable: bool | None = ...,
    planned: bool | None = ...,
    wiring: bool | None = ...,
    of_rewired: bool | None = ...,
) -> T: ...


def option(
    default: Any = MISSING,
    *,
    default_factory: Any = MISSING,
    resumable: bool | None = None,
    planned: bool | None = None,
    wiring: bool | None = None,
    of_rewired: bool | None = None,
) -> Any:
    """As `dataclasses.field`, with what is to be known of the field; None leaves it to the field around it.

    Args:
        default: the field's value where none is given
        default_factory: makes it, where it is a configuration itself
        resumable: it may differ when a run is resumed: no weight depends on it, but for the rounding of a new plan
        planned: a plan of a step's memory depends on it
        wiring: the function of a rewired network depends on it beside its weights
        of_rewired: a backbone that is not rewired would silently leave it out
    """
    flags = {"resumable": resumable, "planned": planned, "wiring": wiring, "of_rewired": of_rewired}
    metadata = {name: value for name, value in flags.items() if value is not None}
    return field(default=default, default_factory=default_factory, metadata=metadata)


def names_with(config: Any, flag: Flag, *, inherited: bool = False) -> Iterator[str]:
    """Dotted names of the plain values in `config` that have `flag`, in their order; `inherited`: what it takes from
    around it."""
    for one in fields(config):
        value, flagged = getattr(config, one.name), one.metadata.get(flag, inherited)
        if is_dataclass(value):
            yield from (f"{one.name}.{name}" for name in names_with(value, flag, inherited=flagged))
        elif flagged:
            yield one.name
