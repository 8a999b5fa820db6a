"""The conditions under which a model and its rewired form are compared: the model is left as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from re2tal.reversible.buffers import buffers_restored
from re2tal.reversible.rng import GeneratorState
from re2tal.rewire.discover import in_mode


@contextmanager
def undisturbed(model: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """Inside, `model` is in evaluation mode, its numbers are of `dtype`, and draws are fixed."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    parameters = [(parameter, parameter.data) for parameter in model.parameters()]
    draws = GeneratorState.now(device)
    with torch.enable_grad(), in_mode(model, training=False), tensors_restored(model), draws.replayed():
        try:
            copies: dict[int, Tensor] = {}
            for parameter, values in parameters:
                parameter.data = cast(values, dtype)
            for module in model.modules():
                for name, buffer in module._buffers.items():
                    if buffer is not None:
                        module._buffers[name] = copies.setdefault(id(buffer), cast(buffer, dtype).clone())
            yield
        finally:
            for parameter, values in parameters:
                parameter.data = values


@contextmanager
def tensors_restored(model: nn.Module) -> Iterator[None]:
    """Restores buffers, other tensors, lists and dicts of modules at the end. What was made inside goes."""
    before = [(module, dict(module._buffers), dict(vars(module))) for module in model.modules()]
    held = [one for _, _, attributes in before for name, one in attributes.items() if name not in _OF_ALL_MODULES]
    contents = [(one, copy(one)) for one in held if type(one) in (dict, list)]
    with buffers_restored(model.modules()):
        try:
            yield
        finally:
            for one, was in contents:
                one.clear()
                one.update(was) if isinstance(one, dict) else one.extend(was)
            for module, buffers, attributes in before:
                for name in set(module._buffers) - set(buffers):
                    delattr(module, name)
                module._buffers.update(buffers)
                # Past __setattr__, which would take a tensor for a buffer of that name, or refuse it.
                for name in [name for name, value in vars(module).items() if isinstance(value, Tensor)]:
                    del vars(module)[name]
                own = ((name, value) for name, value in attributes.items() if name not in _OF_ALL_MODULES)
                vars(module).update((name, value) for name, value in own if isinstance(value, Tensor | dict | list))
                for name in attributes.keys() - vars(module).keys():
                    vars(module)[name] = attributes[name]


_OF_ALL_MODULES = set(vars(nn.Module()))


def cast(values: Any, dtype: torch.dtype | None) -> Any:
    """Values, with the floating tensors among them in `dtype`; as they are for None."""

    def one(leaf: Any) -> Any:
        return leaf.to(dtype) if dtype and isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    return tree_map(one, values)
