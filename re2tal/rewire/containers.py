"""What a container of blocks is besides a container."""

from __future__ import annotations

from types import FunctionType, MethodType
from typing import Any

from torch import nn


def own_names(container: nn.Module) -> set[str]:
    """The attributes and methods that a container has besides those of its kind."""
    kind = nn.Sequential if isinstance(container, nn.Sequential) else nn.ModuleList
    types = type(container).__mro__
    names = {name for one in types[: types.index(kind)] for name in vars(one)} | set(vars(container))
    return {name for name in names if not name.startswith("__")} - _OF_ALL_MODULES


_OF_ALL_MODULES = set(vars(nn.Module()))


def own_attribute(container: nn.Module, name: str, stage: nn.Module) -> Any:
    """One of these, for a stage in the place of the container: methods run over the blocks of the stage."""
    method = getattr(type(container), name, None)
    return MethodType(method, stage) if isinstance(method, FunctionType) else getattr(container, name)
