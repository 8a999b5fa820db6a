"""Reads the arguments of a public implementation, so that none of them is passed over in silence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

REQUIRED = object()


class Arguments:
    """The arguments of one part of a configuration; each must be taken, once, before the `with` block ends."""

    def __init__(self, place: str, given: Mapping[str, Any]) -> None:
        self._place = place
        self._left = dict(given)

    def __enter__(self) -> Arguments:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """ValueError for arguments that were not taken."""
        if kind is None and self._left:
            raise ValueError(f"{self._place}: no option of ours for {self._left}")

    def take(self, name: str, default: Any = REQUIRED) -> Any:
        """The argument, or the peer's `default` where it is not given; a list as a tuple."""
        if name not in self._left and default is REQUIRED:
            raise ValueError(f"{self._place}.{name} is missing")
        return as_tuple(self._left.pop(name, default))

    def only(self, name: str, *accepted: Any) -> None:
        """Takes an argument that we can only give these values, the first of them where it is not given."""
        value = self.take(name, accepted[0])
        if value not in map(as_tuple, accepted):
            raise ValueError(f"{self._place}.{name} is {value!r}; ours is one of {accepted}")

    def part(self, name: str, default: Any = REQUIRED) -> Arguments:
        """An argument that holds arguments."""
        return Arguments(f"{self._place}.{name}", self.take(name, default))

    def drop(self, *names: str) -> None:
        """Arguments of the start, of the machine or of training only, which change no number of a case."""
        for name in names:
            self._left.pop(name, None)


def as_tuple(value: Any) -> Any:
    """Lists, which JSON makes of tuples, as tuples, however deep."""
    if isinstance(value, dict):
        return {key: as_tuple(one) for key, one in value.items()}
    return tuple(map(as_tuple, value)) if isinstance(value, list | tuple) else value
