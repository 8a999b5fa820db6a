"""Where a configuration holds one of several kinds: which kinds there are, and which one a JSON document means.

"windowing": {"kind": "slide", "num_frames": 64}      the tag says it
"windowing": {"num_frames": 64, "overlap": 0.25}      the keys say it: only `slide` has an overlap
"windowing": {"num_frames": 64}                       nothing says it, which is an error
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, fields
from difflib import get_close_matches
from operator import attrgetter
from typing import Any, TypeVar, get_args

from re2tal.data.streaming.windows import ResizeWhole, Slide, Trimmed
from re2tal.localizers import LocalizerConfig

R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class KindChoice:
    """One of several kinds of configuration at one place."""

    key: str
    """The dotted key of the place."""
    tag: str
    """The key in it that names the kind."""
    kinds: Mapping[str, type]
    """Name -> configuration."""

    def kind(self, name: str) -> type:
        """The configuration that `name` names. Raises ValueError with the known names."""
        if name not in self.kinds:
            raise ValueError(f"{self.key} is {name!r}; known: {', '.join(self.kinds)}")
        return self.kinds[name]

    def name(self, run: Any) -> str:
        """What the kind is called that `run` holds."""
        config = attrgetter(self.key)(run)
        return next(name for name, kind in self.kinds.items() if type(config) is kind)

    def replaced(self, run: R, name: str) -> R:
        """`run` with the defaults of the kind `name` in this place, or as it is where it holds that kind already.

        Nothing is checked yet, as what the kind must agree with may still be changed.
        """
        kind = self.kind(name)
        return run if self.name(run) == name else _unchecked(run, self.key.split("."), kind())

    def meant_by(self, values: Mapping[str, Any]) -> str:
        """The name of the kind that JSON `values` are of, by their tag, or where they have none by their keys.

        Raises ValueError where neither tells, and for a key that the kind does not have.
        """
        if self.tag in values:
            name = values[self.tag]
            if not isinstance(name, str) or name not in self.kinds:
                raise ValueError(f"{self.key}.{self.tag} is {name!r}; known: {', '.join(self.kinds)}")
            self._check_known(values, [name])
            return name
        self._check_known(values, self.kinds)
        # Keys may fit several kinds, which is no answer: which one is meant must not depend on their order.
        fitting = [name for name in self.kinds if values.keys() <= self._names(name)]
        if len(fitting) == 1:
            return fitting[0]
        which = f"are of no one kind of {self.key}" if not fitting else f"could be those of {' or '.join(fitting)}"
        raise ValueError(
            f"the keys of {self.key}, {', '.join(values) or 'none'}, {which}; give {self.key}.{self.tag}, one of "
            f"{', '.join(self.kinds)}"
        )

    def _check_known(self, values: Mapping[str, Any], kinds: Iterable[str]) -> None:
        known = sorted(set().union(*(self._names(name) for name in kinds)))
        for key in values:
            if key not in known:
                nearest = get_close_matches(key, known, n=1, cutoff=0.5)
                raise ValueError(
                    f"unknown key {self.key}.{key}"
                    + (f"; did you mean {self.key}.{nearest[0]}?" if nearest else f"; known: {', '.join(known)}")
                )

    def _names(self, kind: str) -> set[str]:
        return {field.name for field in fields(self.kinds[kind])} | {self.tag}


def _unchecked(config: R, path: Sequence[str], value: object) -> R:
    first, *rest = path
    changed = copy(config)
    object.__setattr__(changed, first, _unchecked(getattr(config, first), rest, value) if rest else value)
    return changed


WINDOWING = KindChoice(
    "data.clips.windowing", "kind", {"resize_whole": ResizeWhole, "slide": Slide, "trimmed": Trimmed}
)
LOCALIZER = KindChoice("localizer", "name", {kind.name: kind for kind in get_args(LocalizerConfig)})

CHOICES: dict[str, tuple[KindChoice, ...]] = {"localization": (WINDOWING, LOCALIZER), "recognition": (WINDOWING,)}
"""Task -> all places of its configuration that hold one of several kinds."""
