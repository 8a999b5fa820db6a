"""What lies between reversible runs, stems, mergings, blocks that change resolution, forgets what is inside it as well.

    a run                            keeps two states, whatever its depth
    a convolution, its norm, ReLU    keep three tensors, each as large as a state

In a network that was rewired to recompute, such layers keep their inputs alone, and run once more in backward. Of an
input that a run returned they keep nothing more: it is made again of the states that the run keeps. So are prepared
frames, of the uint8 ones. This is checkpointing, non-reentrant, so that DeepSpeed and DDP see one backward of each;
what they write to buffers is written once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from re2tal.reversible.recompute import Recipe, save_recipes
from re2tal.reversible.replay_context import BufferWatch, held


class Between(nn.Module):
    """A module that has `forgetful` methods."""

    forgets: bool = False
    """Set by `rewire`: whether those forget."""


def forgetful(method: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Makes a method of a `Between` keep its inputs alone where the module forgets.

    It must not use parameters of the module itself, only of modules inside: ZeRO-3 gathers for the call of a module,
    and the second run of a method is no such call.
    """

    @wraps(method)
    def call(self: Between, *args: Any) -> Tensor:
        if self.forgets and torch.is_grad_enabled():
            return recomputed(partial(method, self), *args, owner=self)
        return method(self, *args)

    return call


def recomputed(function: Callable[..., Any], *args: Any, owner: nn.Module, **kwargs: Any) -> Any:
    """`function(*args, **kwargs)`, which keeps nothing but these, and of an argument with a `Recipe` only that.

    `owner` holds the buffers that it may write.
    """
    written: list[Tensor] | None = None
    tensors = {number: arg for number, arg in enumerate(args) if torch.is_grad_enabled() and isinstance(arg, Tensor)}
    remade = {
        number: _remade(recipe, wants_gradient=tensor.requires_grad)
        for number, tensor in tensors.items()
        if (recipe := Recipe.of(tensor)) is not None
    }
    # In the place of those stands something small, which tells the checkpoint their device.
    given = [arg.new_empty(0) if number in remade else arg for number, arg in enumerate(args)]
    fresh = {number: args[number] for number in remade}

    def run(*given: Any, **kwargs: Any) -> Any:
        nonlocal written
        if written is not None:
            again = [remade[number]() if number in remade else arg for number, arg in enumerate(given)]
            with held(written):
                return function(*again, **kwargs)
        watch = BufferWatch(owner)
        output = function(*(fresh.pop(number, arg) for number, arg in enumerate(given)), **kwargs)
        written = watch.written()
        return output

    return checkpoint(run, *given, use_reentrant=False, **kwargs)


def _remade(recipe: Recipe, *, wants_gradient: bool) -> Callable[[], Tensor]:
    """Keeps a recipe, and gives back what is made of it, outside of the graph that it was in."""
    sources, make = save_recipes(*recipe.tensors), recipe.make

    def again() -> Tensor:
        with torch.no_grad():
            return make(*sources()).detach().requires_grad_(wants_gradient)

    return again
