"""What modules hold besides parameters and buffers, from the forward of a run to its backward: numbers, flags, names,
tensors, also in lists, dicts and plain objects; modules inside, and forward hooks.

    block.scale = 0.5            somebody sets it in between: what runs again finds what forward found
    context["step"] = t          the same, of a dict that blocks hold
    block.bias.add_(1)           what forward found is gone. An error
    handle.remove()              the same: what runs again would run without the hook
    self.last = y.detach()       a forward sets it itself, and when it runs again, it sets it again: nothing to say
    self.calls += 1              a forward counts, and counts once more in backward. A warning

Not looked into: arrays, sets, what libraries hold, lists and dicts more than three deep or inside of objects, and what
is behind their first thousand entries. What is added to a list or dict is no change: parents collect outputs there. Nor
is what becomes of a list that a forward makes longer: it collects losses, which parents take out.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from types import NoneType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from torch import Tensor, nn

logger = logging.getLogger(__name__)

_OF_ALL_MODULES = frozenset(vars(nn.Module()))
_SIMPLE = (bool, int, float, complex, str, NoneType)
_KINDS = (*_SIMPLE, Tensor)
_MOST_ENTRIES = 1000
_OF_LIBRARIES = ("torch.", "deepspeed.", "re2tal.")  # whose hooks come and go with what they gather or note
_set_by_forward: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()
_simple_names: dict[type, list[str]] = {}
_warned: set[tuple[type, str]] = set()
"""Types of modules, and the attributes that they count in."""


class _Length(int):
    """Of a list."""


class _Value(NamedTuple):
    value: Any
    version: int
    """Of a tensor."""
    store: Any = None
    """What it can be put back into: the attributes of a module or object, a dict, a list."""
    key: Any = None

    @classmethod
    def of(cls, value: Any, store: Any = None, key: Any = None) -> _Value:
        return cls(value, _version(value), store, key)

    def is_same(self, other: _Value) -> bool:
        """Tensors are compared by identity and version."""
        one, two = self.value, other.value
        if one is two:
            return self.version == other.version
        return type(one) is type(two) and isinstance(one, (*_SIMPLE, tuple)) and (one == two or one != one)

    def can_replace(self, found: _Value | None, module: nn.Module) -> bool:
        """Whether this is still what forward found, and its place still one of the module's."""
        is_there = self.store is vars(module) or (found is not None and found.store is self.store)
        return self.store is not None and is_there and _version(self.value) == self.version

    def __str__(self) -> str:
        kinds = {Tensor: "a tensor", nn.Module: f"a {type(self.value).__name__}", tuple: "a list of hooks"}
        return next((name for kind, name in kinds.items() if isinstance(self.value, kind)), repr(self.value))


def _version(value: Any) -> int:
    return value._version if isinstance(value, Tensor) and not value.is_inference() else 0


_Absent = object()
_Values = dict[tuple[nn.Module, str], _Value]
_Holders = dict[int, tuple[Any, str]]
"""By its number: a list, dict or object, which is looked into once, and the module that was found to hold it."""


class Attributes:
    """Those of the modules in `owner`, as forward found and left them."""

    def __init__(self, owner: nn.Module | None) -> None:
        self._modules = [] if owner is None else list(owner.modules())
        self._values = self._now()
        self._counted: dict[tuple[nn.Module, str], Any] = {}
        """What forward added to numbers."""
        self._before: _Values = {}
        """Backward."""
        self._exchanged: list[_Value] = []
        """What forward found where backward would find something else."""

    def _now(self) -> _Values:
        """Without tensors that a forward sets: they would be kept alive."""
        holders: _Holders = {}
        return {
            (module, name): _Value.of(value, *place)
            for module in self._modules
            for name, value, *place in _held_by(module, holders)
            if not (isinstance(value, Tensor) and _is_set_by_forward(module, name))
        }

    def ran(self) -> None:
        """After forward."""
        now = self._now()
        self._counted = _note_changes(self._values, now)
        self._values = {key: value for key, value in now.items() if not _is_set_by_forward(*key)}

    def changes(self) -> Iterator[tuple[str, str]]:
        """Before backward: what somebody else than a forward has set since and `put_back` cannot, and from what to
        what."""
        now = self._before = self._now()
        self._exchanged = []
        hooked = {key: _Value((), 0) for key in now if key[1] in ("_forward_hooks", "_forward_pre_hooks")}
        for (module, name), was in (hooked | self._values).items():
            if isinstance(was.value, _Length):
                continue
            there = now.get((module, name))
            found = there or _Value.of(() if type(was.value) is tuple else getattr(module, name, None))
            if was.is_same(found) or _is_set_by_forward(module, name):
                continue
            if was.can_replace(there, module):
                self._exchanged.append(was)
                self._before[module, name] = was
            else:
                change = f"it was {was}, and is {'another' if str(was) == str(found) else found}"
                yield f"{name} of a {type(module).__name__}, a module", change

    @contextmanager
    def put_back(self) -> Iterator[None]:
        """Behind `changes`: inside, modules hold what forward found. Behind it what they held, but where a hook of
        backward has set something else."""
        exchanged, self._exchanged = self._exchanged, []
        found = [_at(was.store, was.key) for was in exchanged]
        try:
            for was in exchanged:
                was.store[was.key] = was.value
            yield
        finally:
            for was, value in zip(exchanged, found, strict=True):
                if _at(was.store, was.key) is not was.value:
                    continue
                if value is _Absent:
                    del was.store[was.key]
                else:
                    was.store[was.key] = value

    @contextmanager
    def running_again(self) -> Iterator[None]:
        """Behind `changes`, around the second run of branches. Warns of what they count twice a step."""
        before, self._before = self._before, {}
        yield
        for key, step in _note_changes(before, self._now()).items():
            kind, name = type(key[0]), key[1]
            if step and self._counted.get(key) == step and (kind, name) not in _warned:
                _warned.add((kind, name))
                logger.warning(
                    "%s of a %s counts by %s in forward, and once more in backward, where a reversible run runs its "
                    "branches again: let it count in a buffer, or count outside of the run",
                    *(name, kind.__name__, step),
                )


def _at(store: Any, key: Any) -> Any:
    if isinstance(store, dict):
        return store.get(key, _Absent)
    return store[key] if key < len(store) else _Absent


_Leaf = tuple[str, Any] | tuple[str, Any, Any, Any]
"""A name and what it is; where it can be put back, its store and key there."""


def _held_by(module: nn.Module, holders: _Holders) -> Iterator[_Leaf]:
    own = vars(module)
    for name, value in own.items():
        if name not in _OF_ALL_MODULES:
            yield from _leaves_of((name, value, own, name), module, holders, 3)
    for name in _names_of_type(type(module)):
        # Until somebody sets it on the module, the type's counts.
        if name not in own and isinstance(value := getattr(type(module), name), _SIMPLE):
            yield name, value, own, name
    yield from module._modules.items()
    for name, hooks in (("_forward_hooks", module._forward_hooks), ("_forward_pre_hooks", module._forward_pre_hooks)):
        if hooks and (
            of_users := tuple(hook for hook in hooks.values() if not module_of(hook).startswith(_OF_LIBRARIES))
        ):
            yield name, of_users


def _names_of_type(kind: type[nn.Module]) -> list[str]:
    """Of numbers, flags and names that a user's type of module has itself."""
    if kind not in _simple_names:
        types = [one for one in kind.__mro__ if not f"{one.__module__}.".startswith((*_OF_LIBRARIES, "builtins."))]
        named = {name for one in types for name, value in vars(one).items() if isinstance(value, _SIMPLE)}
        _simple_names[kind] = sorted(name for name in named if not name.startswith("__"))
    return _simple_names[kind]


def _leaves_of(held: tuple[str, Any, Any, Any], module: nn.Module, holders: _Holders, depth: int) -> Iterator[_Leaf]:
    """What `held` is or holds, by names such as `context['step']`."""
    name, value, *_ = held
    if isinstance(value, _KINDS):
        yield held
        return
    is_container = isinstance(value, dict | list | tuple)
    if not depth or not (is_container or _is_plain_object(value)):
        return
    if id(value) in holders:
        yield name, holders[id(value)][1]
        return
    if not isinstance(value, tuple):
        holders[id(value)] = value, f"the {name} of another module ({type(module).__name__}, {id(module)})"
    if not is_container:
        inside = vars(value)
        yield from ((f"{name}.{key}", one, inside, key) for key, one in inside.items() if isinstance(one, _KINDS))
        return
    if isinstance(value, list):
        yield name, _Length(len(value))
        if _is_set_by_forward(module, name):
            return
    for key, one in islice(value.items() if isinstance(value, dict) else enumerate(value), _MOST_ENTRIES):
        # Of a tuple nothing is exchanged.
        yield from _leaves_of((f"{name}[{key!r}]", one, value, key), module, holders, depth - 1)


def _is_plain_object(value: Any) -> bool:
    kind = type(value)
    return hasattr(value, "__dict__") and not (callable(value) or f"{kind.__module__}.".startswith(_OF_LIBRARIES))


def module_of(hook: Any) -> str:
    """The Python module in which the function of a hook is written."""
    return str(getattr(getattr(hook, "func", hook), "__module__", ""))


def _is_set_by_forward(module: nn.Module, name: str) -> bool:
    """Or what holds it."""
    names = _set_by_forward.get(module, ())
    return name in names or any(name[:place] in names for place, sign in enumerate(name) if names and sign == "[")


def _note_changes(before: _Values, after: _Values) -> dict[tuple[nn.Module, str], Any]:
    """Notes what branches have set. Returns what they added to numbers."""
    counted = {}
    for module, name in before.keys() - after.keys():
        if type(before[module, name].value) is not tuple:  # a hook that removes itself
            _set_by_forward.setdefault(module, set()).add(name)
    for (module, name), now in after.items():
        was = before.get((module, name))
        if was is None or not was.is_same(now):
            _set_by_forward.setdefault(module, set()).add(name)
            if was and type(was.value) is type(now.value) and type(now.value) in (int, float):
                counted[module, name] = now.value - was.value
    return counted
