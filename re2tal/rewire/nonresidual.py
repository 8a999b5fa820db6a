"""Layers between reversible runs (stems, merging, blocks that change resolution) recompute their insides in backward.

    a run                            saves two states, whatever its depth
    a convolution, its norm, ReLU    save three tensors, each as large as a state

In a network that is rewired to recompute, such layers save only their inputs, and run once more in backward. An input
that a run returned is not saved either: it is recomputed from the states that the run saves. Prepared frames are
recomputed from the uint8 ones. This is non-reentrant checkpointing, so that DeepSpeed and DDP see one backward of each
layer. Buffers are written once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from re2tal.reversible.buffers import BufferWatch, SavedBuffer, buffers_restored
from re2tal.reversible.recompute import Recipe, save_recipes
from re2tal.reversible.replay_context import ModuleState


class CheckpointedModule(nn.Module):
    """A module between reversible runs, with methods marked `checkpointed`."""

    checkpointing: bool = False
    """Whether these methods recompute their insides in backward. `rewire` sets it."""


def checkpointed(method: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Makes a method of a `CheckpointedModule` save only its inputs and run again in backward, if `checkpointing`.

    The method must not use parameters of the module itself, only those of modules inside: ZeRO-3 gathers parameters
    when a module is called, and backward runs the method again without such a call. Where it uses a few of many modules
    inside, call `recomputed` with those: a change of any is an error.
    """

    @wraps(method)
    def call(self: CheckpointedModule, *args: Any) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            return recomputed(partial(method, self), *args, owner=self)
        return method(self, *args)

    return call


def recomputed(function: Callable[..., Any], *args: Any, owner: nn.Module, **kwargs: Any) -> Any:
    """Returns `function(*args, **kwargs)`; autograd saves only the arguments, or their `Recipe` where they have one.

    `owner` holds the parameters and buffers that the function uses. If they change before backward, that is an error.
    """
    written: list[nn.Module] | None = None
    read: list[SavedBuffer] = []
    modules = ModuleState(owner)
    tensors = {number: arg for number, arg in enumerate(args) if torch.is_grad_enabled() and isinstance(arg, Tensor)}
    remade = {
        number: _remade(recipe, wants_gradient=tensor.requires_grad)
        for number, tensor in tensors.items()
        if (recipe := Recipe.of(tensor)) is not None
    }
    # An argument with a recipe is replaced by an empty tensor, from which the checkpoint can still read the device.
    given = [arg.new_empty(0) if number in remade else arg for number, arg in enumerate(args)]
    fresh = {number: args[number] for number in remade}

    def run(*given: Any, **kwargs: Any) -> Any:
        nonlocal written, read
        if written is not None:
            again = [remade[number]() if number in remade else arg for number, arg in enumerate(given)]
            modules.check()
            # It finds buffers as it did the first time; afterwards they have their present values again.
            with buffers_restored(written), modules.as_in_forward():
                for one in read:
                    one.restore()
                return function(*again, **kwargs)
        watch = BufferWatch(owner)
        saved = watch.save()
        # Taken out of `fresh`, which the checkpoint would otherwise hold until backward, with the inputs in it.
        output = function(*(fresh.pop(number, arg) for number, arg in enumerate(given)), **kwargs)
        read = [*watch.changed_since(saved), *watch.find_writers()]
        written = list(dict.fromkeys([*watch.changed_modules(), *(one.module for one in read)]))
        modules.ran(writers=written)
        return output

    return checkpoint(run, *given, use_reentrant=False, **kwargs)


def _remade(recipe: Recipe, *, wants_gradient: bool) -> Callable[[], Tensor]:
    """Saves a recipe. The function returned recomputes its tensor as a leaf, outside of the original graph."""
    sources, make = save_recipes(*recipe.tensors), recipe.make

    def again() -> Tensor:
        with torch.no_grad():
            return make(*sources()).detach().requires_grad_(wants_gradient)

    return again
