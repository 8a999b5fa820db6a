"""Recipes to recompute a tensor from others that are kept anyway, so that no layer has to save it.

    y = merge(x[n-1], x[n])      the run that returned y keeps these two states, so nobody needs to save y too
    pixels = prepare(frames)     frames are uint8: a quarter of the pixels' bytes, or half of them

Inside hooks on saved tensors (checkpoints, `save_on_cpu`, `offload`) no recipe is attached: those hooks
may move the saved tensors elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.weak import TensorWeakRef

_NAME = "_re2tal_recipe"
_Reference = Callable[[Tensor], Tensor | None]
"""Takes the tensor that has the recipe; returns one of the recipe's, or None if that is gone or was written to."""


class Recipe(NamedTuple):
    """Tensors that are kept anyway, or are smaller, and a function that computes another tensor from them."""

    tensors: tuple[Tensor, ...]
    make: Callable[..., Tensor]
    """Must return the same bits as the first time, in the same memory layout."""

    @classmethod
    def of(cls, tensor: Tensor) -> Recipe | None:
        """The recipe of a tensor; None if it has none, or if the tensor or the recipe's tensors changed since.

        Views of the tensor share its recipe, because ZeRO-3 returns a view of what a module returns. A view that is
        detached from the tensor's graph has none: its backward may run after that of the run, which consumes the
        states.
        """
        found = None if _hooked() else getattr(tensor.untyped_storage(), _NAME, None)
        if found is None:
            return None
        references, make, values, place = found
        if values != _values(tensor):
            return None
        # `tensor` may be a view; parts that have no recipe are cut out of the whole.
        whole = tensor.detach().as_strided(*place)
        tensors = tuple(one for reference in references if (one := reference(whole)) is not None)
        if len(tensors) < len(references):
            return None
        return cls(tensors, make if place == _place(tensor) else partial(_view, make, place, _place(tensor)))


def recomputable_from(tensor: Tensor, tensors: Sequence[Tensor], make: Callable[..., Tensor]) -> Tensor:
    """Attaches a recipe to `tensor`, which is not a view: `make(*tensors)` must compute it. Returns `tensor`."""
    return _with_references(tensor, [_weakly(one) for one in tensors], make)


def cat_with_recipe(tensors: Sequence[Tensor], *, dim: int) -> Tensor:
    """`torch.cat`, with a recipe if any part has one: it uses the parts' recipes, and copies of other parts."""
    output = torch.cat(list(tensors), dim)
    references: list[_Reference] = []
    makers: list[tuple[Callable[..., Tensor], int]] = []
    recipes, start = [Recipe.of(tensor) for tensor in tensors], 0
    for tensor, recipe in zip(tensors, recipes, strict=True):
        size = tensor.shape[dim]
        # A part without a recipe is copied out of the whole when somebody asks for it. A reference to the part itself
        # would keep it alive as long as the whole, even if nobody asks.
        references += [partial(_part, dim, start, size)] if recipe is None else map(_weakly, recipe.tensors)
        makers.append((_itself, 1) if recipe is None else (recipe.make, len(recipe.tensors)))
        start += size

    def make(*parts: Tensor) -> Tensor:
        following = iter(parts)
        return torch.cat([make_one(*islice(following, number)) for make_one, number in makers], dim)

    return _with_references(output, references, make) if any(recipes) else output


def save_recipes(*tensors: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """Saves tensors as autograd does, or only its recipe where a tensor has one. The function returned gives them back.

    Hooks on saved tensors see what is saved. That function raises a RuntimeError if something saved was written to.
    """
    recipes = [Recipe.of(tensor) or Recipe((tensor,), _itself) for tensor in tensors]
    makers = [(recipe.make, len(recipe.tensors)) for recipe in recipes]
    sources = (source.detach() for recipe in recipes for source in recipe.tensors)
    # Before torch 2.12 a node frees what it saved when the last of its outputs is gone: the node alone is not enough.
    # The anchor wants a gradient, or autograd would record no node.
    kept = _Keep.apply(torch.empty(0, requires_grad=True), *sources)

    def again() -> tuple[Tensor, ...]:
        try:
            following = iter(kept.grad_fn.saved_tensors)
        except RuntimeError as error:
            raise RuntimeError(
                "a layer's input is to be recomputed in backward, but the tensors of its recipe have changed: either "
                "backward went through a reversible run twice, and the first time consumed its states (add the losses "
                "and call backward once, or run with recompute=False), or somebody has written to them, or to the "
                "frames of the batch (leave those alone until backward has ended)"
            ) from error
        with torch.no_grad():
            return tuple(make(*islice(following, number)) for make, number in makers)

    return again


class _Keep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return anchor.new_empty(0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        raise AssertionError("the output of _Keep is used by nothing, so no gradient reaches it")


def _with_references(tensor: Tensor, references: Sequence[_Reference], make: Callable[..., Tensor]) -> Tensor:
    if torch.is_grad_enabled() and not _hooked():
        # On the storage, because views share that.
        setattr(tensor.untyped_storage(), _NAME, (references, make, _values(tensor), _place(tensor)))
    return tensor


def _values(tensor: Tensor) -> tuple:
    """What must not change while a recipe holds: writing to the tensor, or detaching it, changes it."""
    return tensor.dtype, tensor._version, tensor.requires_grad, tensor.is_leaf


def _place(tensor: Tensor) -> tuple:
    """Where the tensor lies in its storage."""
    return tensor.shape, tensor.stride(), tensor.storage_offset()


def _view(make: Callable[..., Tensor], place: tuple, part: tuple, *tensors: Tensor) -> Tensor:
    made = make(*tensors)
    assert _place(made) == place
    return made.as_strided(*part)


def hooks_on_saved() -> tuple[Callable, Callable] | None:
    """The hooks on saved tensors that are in force: others than before mean a checkpoint, or the like, in between."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False)


def _hooked() -> bool:
    """Whether hooks are in force that may move saved tensors elsewhere."""
    return hooks_on_saved() is not None and not _only_looking.get()


_only_looking: ContextVar[bool] = ContextVar("only_looking", default=False)


@contextmanager
def saved_tensors_seen_by(look: Callable[[Tensor], object]) -> Iterator[None]:
    """Inside, `look` sees every tensor that autograd saves. Recipes work as they do outside."""

    def seen(tensor: Tensor) -> Tensor:
        look(tensor)
        return tensor

    token = _only_looking.set(True)
    try:
        with saved_tensors_hooks(seen, lambda tensor: tensor):
            yield
    finally:
        _only_looking.reset(token)


def _weakly(tensor: Tensor) -> _Reference:
    # Weak, because a recipe must not keep alive what backward has consumed.
    reference, version = TensorWeakRef(tensor), tensor._version

    def unchanged(_: Tensor) -> Tensor | None:
        found = reference()
        return found if found is not None and found._version == version else None

    return unchanged


def _part(dim: int, start: int, size: int, whole: Tensor) -> Tensor:
    return whole.detach().narrow(dim, start, size).clone()


def _itself(tensor: Tensor) -> Tensor:
    return tensor
