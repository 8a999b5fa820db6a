"""Globals that the code of a block, and of functions that it calls, reads while it is traced: a graph holds them.

    SCALE    config.SCALE    Settings.scale    helper()      read while traced: must be the same from then on

What is read is found in the bytecode of each function that runs. Code of torch, NumPy and Python itself is left out, as
are variables of enclosing functions.
"""

from __future__ import annotations

import dis
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from types import CodeType, FrameType, FunctionType, ModuleType, NoneType
from typing import Any

import numpy as np

_LEFT_OUT = {"torch", "numpy", *sys.stdlib_module_names}
_NUMBERS = (bool, int, float, complex, str, bytes, NoneType, Enum, np.ndarray)
_CONTAINERS = (list, dict, tuple, set, frozenset)
_MOST = 256
"""Entries of a container that is compared: larger ones are registries."""


@dataclass(slots=True)
class GlobalReads:
    """The globals that were read, and what they held."""

    values: dict[tuple[str, ...], tuple[dict[str, Any], Any]] = field(default_factory=dict)
    """(module of Python, name, attribute ..) -> the globals of that module, and the contents of the value"""
    written: set[str] = field(default_factory=set)

    def changes(self, contents: Callable[[Any], Any]) -> Iterator[tuple[str, Any, Any]]:
        """Names of those that hold something else now, and what they held and hold."""
        for (module, *names), (holder, was) in self.values.items():
            if (now := contents(_value(holder, names))) != was:
                yield f"{'.'.join(names)} of {module}", was, now

    @contextmanager
    def recorded(self, contents: Callable[[Any], Any]) -> Iterator[None]:
        """Inside, what running code reads and writes is noted; `contents` makes of a value what is compared."""
        seen: dict[int, CodeType] = {}

        def note(frame: FrameType, event: str, arg: Any) -> None:
            code, holder = frame.f_code, frame.f_globals
            if event == "call" and id(code) not in seen:
                seen[id(code)] = code
                module = holder.get("__name__", "")
                if module.partition(".")[0] not in _LEFT_OUT and not module.startswith("re2tal.re"):
                    self._note(code, holder, module, contents)

        before = sys.getprofile()
        sys.setprofile(note)
        try:
            yield
        finally:
            sys.setprofile(before)
        # torch.fx wraps some functions in globals while it traces.
        for (_, *names), (holder, was) in self.values.items():
            if isinstance(was, FunctionType):
                self.values[holder["__name__"], *names] = holder, contents(_value(holder, names))

    def _note(self, code: CodeType, holder: dict[str, Any], module: str, contents: Callable[[Any], Any]) -> None:
        instructions = list(dis.get_instructions(code))
        for place, one in enumerate(instructions):
            if one.opname == "STORE_GLOBAL":
                self.written.add(f"{one.argval} of {module}")
            if one.opname not in ("LOAD_GLOBAL", "LOAD_NAME") or one.argval not in holder:
                continue
            names = [one.argval]
            for following in instructions[place + 1 :]:
                owner = _value(holder, names)
                if not (isinstance(owner, ModuleType | type) and following.opname in ("LOAD_ATTR", "LOAD_METHOD")):
                    break
                names.append(following.argval)
            if _is_compared(value := _value(holder, names)):
                self.values.setdefault((module, *names), (holder, contents(value)))


def _value(holder: dict[str, Any], names: list[str]) -> Any:
    value = holder.get(names[0])
    for name in names[1:]:
        value = getattr(value, name, None)
    return value


def _is_compared(value: Any) -> bool:
    if isinstance(value, FunctionType):
        return str(value.__module__).partition(".")[0] not in _LEFT_OUT
    return isinstance(value, _NUMBERS) or (type(value) in _CONTAINERS and len(value) <= _MOST)
