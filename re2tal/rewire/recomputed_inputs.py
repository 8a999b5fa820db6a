"""Recomputes a convolution's input in backward from tensors that are kept anyway, instead of saving it.

    frames -> gather -> clips -> patch embedding        its convolution needs clips for the gradient of its weights;
                                                        frames and the gather, which costs a copy, are as good
    run -> (+ lateral) -> downsampling block            its convolutions need what the run returned, which is the mean
                                                        of two states that the run keeps

Only the input is computed twice; the layer's own operations are not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules.conv import _ConvNd

from re2tal.reversible.recompute import Recipe, hooks_on_saved, save_recipes


@contextmanager
def recompute_conv_inputs(model: nn.Module, make: Callable[..., Tensor], *sources: Tensor) -> Iterator[Tensor]:
    """Yields `make(*sources)`. Convolutions of `model` called with it, or with a view of it, save `sources` instead.

    `make` must return the same bits in the same memory layout each time. Writing to `sources` before backward raises,
    as writing to any saved tensor does.
    """
    made = make(*sources)
    with _convolutions_remake(model, made, make, sources) if torch.is_grad_enabled() else nullcontext():
        yield made


def saving_recipe(block: nn.Module, x: Any) -> AbstractContextManager[None]:
    """Inside, convolutions of `block` that are called with `x` save its `Recipe`, if it has one."""
    recipe = Recipe.of(x) if isinstance(x, Tensor) and torch.is_grad_enabled() else None
    return nullcontext() if recipe is None else _convolutions_remake(block, x, recipe.make, recipe.tensors)


@contextmanager
def _convolutions_remake(
    model: nn.Module, made: Tensor, make: Callable[..., Tensor], sources: Sequence[Tensor]
) -> Iterator[None]:
    """Inside, convolutions of `model` that are called with `made`, or a view of it, save what it is made of.

    Not where `made` was written to since, nor under hooks on saved tensors that the model sets: a checkpoint inside it
    counts what each of its two runs saves.
    """
    kept_sources = save_recipes(*sources)
    storage, version, hooks = _storage(made), made._version, hooks_on_saved()
    with ExitStack() as handles, ExitStack() as inside:

        def before(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if not args or _storage(args[0]) != storage:
                return None
            if args[0]._version != version or hooks_on_saved() != hooks:
                return None
            x, *others = args
            view, dtype = (x.size(), x.stride(), x.storage_offset()), _dtype_inside(x)

            def again() -> Tensor:
                return make(*kept_sources()).as_strided(*view).to(dtype)

            # Converted here, not by autocast inside the convolution, which would save a copy without a known source.
            x = x.to(dtype)
            inside.enter_context(_remade(x, again))
            return x, *others

        for layer in model.modules():
            if isinstance(layer, _ConvNd):
                handles.callback(layer.register_forward_pre_hook(before).remove)
                handles.callback(layer.register_forward_hook(lambda *_: inside.close(), always_call=True).remove)
        yield


def _remade(x: Tensor, again: Callable[[], Tensor]) -> saved_tensors_hooks:
    """Inside, autograd saves `again` instead of `x` and its views."""
    storage = _storage(x)

    def pack(tensor: Tensor) -> Any:
        return (tensor.size(), tensor.stride(), tensor.storage_offset()) if _storage(tensor) == storage else tensor

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        with torch.no_grad():
            return again().as_strided(*packed)

    return saved_tensors_hooks(pack, unpack)


def _dtype_inside(x: Tensor) -> torch.dtype:
    """The dtype in which a convolution computes with `x`."""
    kind = x.device.type
    narrowed = torch.is_autocast_enabled(kind) and x.dtype != torch.float64
    return torch.get_autocast_dtype(kind) if narrowed else x.dtype


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
