"""What the code of a block reads from its modules while it is traced: a graph holds it as constants.

    self.p, self.config, self.adapter is None, self.norm.training       read while traced: must be the same from then on

Modules that the code only calls are called by the graph as well, so they may change: other weights, another dropout, a
layer with LoRA in the place of a plain one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from re2tal.rewire.hooks import of_users
from re2tal.rewire.read_globals import GlobalReads
from re2tal.rewire.traced import RefusedError

_OF_ALL_MODULES = set(vars(nn.Module())) - {"training"}
_NUMBERS = (bool, int, float, complex, str, bytes, type(None), Enum, slice, torch.dtype, torch.device, torch.layout)
_PLAIN = (*_NUMBERS, type, FunctionType, BuiltinFunctionType, ModuleType, torch.memory_format)
_MISSING = "nothing"


class TracedError(ValueError):
    """A block is no longer what it was when its code was traced."""


@dataclass(frozen=True, slots=True)
class Reads:
    """What was read, by (path of the module in the block, name), and the modules whose code is part of the graph."""

    values: dict[tuple[str, str], Any] = field(default_factory=dict)
    entered: dict[str, tuple] = field(default_factory=dict)
    globals: GlobalReads = field(default_factory=GlobalReads)

    def check(self, block: nn.Module) -> None:
        """Raises TracedError where any of it has changed."""
        kind, again = type(block).__name__, "unrewire the model, and rewire it once more"
        for (path, name), was in self.values.items():
            module = block.get_submodule(path)
            now = module.training == block.training if name == "training" else _value_of(module, name)
            if now != was:
                if name == "training":
                    raise TracedError(
                        f"{path} of a {kind} that was taken apart is in another mode than the block; give both the "
                        "same, or register residual_branches"
                    )
                raise TracedError(
                    f"{name} of a {type(module).__name__} is {_shown(now)}, and was {_shown(was)} when it was taken "
                    f"apart; {again}"
                )
        for name, was, now in self.globals.changes(fingerprint):
            raise TracedError(
                f"the global {name} is {_shown(now)}, and was {_shown(was)} when a {kind} that reads it was taken "
                f"apart; {again}"
            )
        for path, was in self.entered.items():
            if _form_of(block.get_submodule(path)) != was:
                raise TracedError(
                    f"{path} of a {kind} has another type, hooks or another forward than when the block was taken "
                    f"apart; {again}"
                )


@contextmanager
def recorded_reads(block: nn.Module, entered: Sequence[nn.Module]) -> Iterator[Reads]:
    """Inside, what is read from the modules of `block` is recorded. Raises RefusedError where it is written as well."""
    paths = {module: path for path, module in block.named_modules()}
    reads = Reads(entered={paths[module]: _form_of(module) for module in entered})
    plain, modules = object.__getattribute__, cast(Any, nn.Module)
    usual, is_recording = modules.__setattr__, False

    def read(module: nn.Module, name: str) -> Any:
        nonlocal is_recording
        if (
            not (is_recording or name in _OF_ALL_MODULES or hasattr(nn.Module, name) or name.startswith("__"))
            and (path := paths.get(module)) is not None
        ):
            is_recording = True  # what `_value_of` reads is not the block's own reading
            try:
                reads.values.setdefault((path, name), True if name == "training" else _value_of(module, name))
            finally:
                is_recording = False
        return plain(module, name)

    def write(module: nn.Module, name: str, value: Any) -> None:
        # What it has set already, called in the same way, it may set again: a window that is cut to the picture.
        if module in paths and not (is_known(value) and fingerprint(value) == _value_of(module, name)):
            raise RefusedError(f"it sets {name} of a {type(module).__name__}, which a graph would not do")
        usual(module, name, value)

    modules.__getattribute__, modules.__setattr__ = read, write
    try:
        with reads.globals.recorded(fingerprint):
            yield reads
    finally:
        del modules.__getattribute__  # nn.Module has none of its own, so object's is back
        modules.__setattr__ = usual
    if changed := [*reads.globals.written, *(name for name, _, _ in reads.globals.changes(fingerprint))]:
        raise RefusedError(f"it changes the global {changed[0]}, which a graph would not do")
    try:
        reads.check(block)
    except TracedError as changed:
        raise RefusedError(str(changed)) from None


def fingerprint(value: Any, depth: int = 3) -> Any:
    """A value that is equal for equal contents. Tensors and modules count by their type alone."""
    if isinstance(value, float) and value != value:
        return "nan"
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, MethodType):
        return value.__func__
    if isinstance(value, np.ndarray):
        return value.shape, value.tobytes()
    if isinstance(value, Tensor | nn.Module) or not depth:
        return Tensor if isinstance(value, Tensor) else nn.Module if isinstance(value, nn.Module) else type(value)
    if isinstance(value, Mapping):
        return type(value), [(key, fingerprint(inner, depth - 1)) for key, inner in value.items()]
    if isinstance(value, set | frozenset):
        return type(value), sorted(map(repr, value))
    if isinstance(value, list | tuple):
        return type(value), [fingerprint(inner, depth - 1) for inner in value]
    return type(value), fingerprint(vars(value), depth - 1) if hasattr(value, "__dict__") else None


def numbers_of(block: nn.Module) -> dict[str, Any]:
    """The numbers, flags and names that modules of `block` hold, alone or in lists and dicts, by their paths."""
    return {
        ".".join(filter(None, (path, name))): fingerprint(value)
        for path, module in block.named_modules()
        for name, value in vars(module).items()
        if name not in _OF_ALL_MODULES
        and type(value) in (bool, int, float, str, list, dict)
        and all(type(leaf) in (bool, int, float, str) for leaf in tree_leaves(value))
    }


def is_known(value: Any) -> bool:
    """Whether a constant shows all of its contents: no object with attributes of its own."""
    return isinstance(value, (*_PLAIN, np.ndarray, MethodType))


def _value_of(module: nn.Module, name: str) -> Any:
    # Past __getitem__ of these dicts, with which ZeRO-3 gathers parameters.
    for store, kind in ((module._parameters, Tensor), (module._buffers, Tensor), (module._modules, nn.Module)):
        if name in store:
            return None if dict.get(store, name) is None else kind
    return fingerprint(getattr(module, name, _MISSING))


def _form_of(module: nn.Module) -> tuple:
    hooks = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    return type(module), "forward" in vars(module), [list(one) if of_users(one) else [] for one in hooks]


def _shown(value: Any) -> str:
    match value:
        case type():
            return f"a {value.__name__}"
        case (type() as kind, _):
            return f"a {kind.__name__} of other contents"
    return repr(value)
