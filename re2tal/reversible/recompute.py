"""Of what a tensor can be made again, so that a layer that needs it in backward need not keep it.

    y = merge(x[n-1], x[n])      the run that returned y keeps these two states, and y need not be kept beside them
    pixels = prepare(frames)     frames are uint8, a quarter of the pixels' bytes, or half

Inside hooks on saved tensors (checkpoints, `save_on_cpu`, `offload`) nothing has an origin: what they keep is not here.
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

_NAME = "_re2tal_origin"
_Reference = Callable[[Tensor], Tensor | None]
"""From the tensor that has the origin to one of its tensors, if that is still there, as it was."""


class Origin(NamedTuple):
    """Tensors that are kept anyway, or are smaller, and what makes another one of them."""

    tensors: tuple[Tensor, ...]
    make: Callable[..., Tensor]
    """Returns the same bits as the first time, laid out in the same way."""

    @classmethod
    def of(cls, tensor: Tensor) -> Origin | None:
        """That of a tensor which was given one, if it is still there and nobody has written to anything since.

        Views of that tensor have it too, as ZeRO-3 makes one of what a module returns. One that autograd does not
        follow back to it has none: whoever needs it may do so when a run's backward has consumed the states.
        """
        found = None if _hooked() else getattr(tensor.untyped_storage(), _NAME, None)
        if found is None:
            return None
        references, make, values, place = found
        if values != _values(tensor):
            return None
        whole = tensor.detach().as_strided(*place)
        tensors = tuple(one for reference in references if (one := reference(whole)) is not None)
        if len(tensors) < len(references):
            return None
        return cls(tensors, make if place == _place(tensor) else partial(_view, make, place, _place(tensor)))


def with_origin(tensor: Tensor, tensors: Sequence[Tensor], make: Callable[..., Tensor]) -> Tensor:
    """`tensor`, which is not a view, and which `make` makes of `tensors`."""
    return _with_references(tensor, [_weakly(one) for one in tensors], make)


def joined(tensors: Sequence[Tensor], *, dim: int) -> Tensor:
    """`torch.cat`, whose origin, if any part has one, is those of its parts, and copies of the parts that have none."""
    output = torch.cat(list(tensors), dim)
    references: list[_Reference] = []
    makers: list[tuple[Callable[..., Tensor], int]] = []
    origins, start = [Origin.of(tensor) for tensor in tensors], 0
    for tensor, origin in zip(tensors, origins, strict=True):
        size = tensor.shape[dim]
        # Copied when somebody asks: held here, the part would live as long as the whole, whoever keeps that.
        references += [partial(_part, dim, start, size)] if origin is None else map(_weakly, origin.tensors)
        makers.append((_itself, 1) if origin is None else (origin.make, len(origin.tensors)))
        start += size

    def make(*parts: Tensor) -> Tensor:
        following = iter(parts)
        return torch.cat([make_one(*islice(following, number)) for make_one, number in makers], dim)

    return _with_references(output, references, make) if any(origins) else output


def keeping(*tensors: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """Keeps tensors as autograd does, of one with an origin only that, and gives them back: hooks on saved tensors see
    what is kept, and a RuntimeError tells if it was written to in between."""
    origins = [Origin.of(tensor) or Origin((tensor,), _itself) for tensor in tensors]
    makers = [(origin.make, len(origin.tensors)) for origin in origins]
    sources = (source.detach() for origin in origins for source in origin.tensors)
    node: Any = _Keep.apply(torch.empty(0, requires_grad=True), *sources).grad_fn

    def again() -> tuple[Tensor, ...]:
        try:
            following = iter(node.saved_tensors)
        except RuntimeError as error:
            raise RuntimeError(
                "a layer's input is to be made again in backward, but what it is made of is not what it was: either "
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
        raise AssertionError("nothing follows from what is only kept")


def _with_references(tensor: Tensor, references: Sequence[_Reference], make: Callable[..., Tensor]) -> Tensor:
    if torch.is_grad_enabled() and not _hooked():
        setattr(tensor.untyped_storage(), _NAME, (references, make, _values(tensor), _place(tensor)))
    return tensor


def _values(tensor: Tensor) -> tuple:
    """Equal for tensors of the same values at the same place of a storage that autograd follows alike."""
    return tensor.dtype, tensor._version, tensor.requires_grad, tensor.is_leaf


def _place(tensor: Tensor) -> tuple:
    """In its storage."""
    return tensor.shape, tensor.stride(), tensor.storage_offset()


def _view(make: Callable[..., Tensor], place: tuple, part: tuple, *tensors: Tensor) -> Tensor:
    made = make(*tensors)
    assert _place(made) == place
    return made.as_strided(*part)


def _hooked() -> bool:
    """Whether what autograd saves now goes through hooks that may take it elsewhere."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None and not _only_looking.get()


_only_looking: ContextVar[bool] = ContextVar("only_looking", default=False)


@contextmanager
def saved_tensors_seen_by(look: Callable[[Tensor], object]) -> Iterator[None]:
    """Inside, `look` is called with every tensor that autograd saves, and nothing is kept that otherwise were not."""

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
    reference, version = TensorWeakRef(tensor), tensor._version

    def unchanged(_: Tensor) -> Tensor | None:
        found = reference()
        return found if found is not None and found._version == version else None

    return unchanged


def _part(dim: int, start: int, size: int, whole: Tensor) -> Tensor:
    return whole.detach().narrow(dim, start, size).clone()


def _itself(tensor: Tensor) -> Tensor:
    return tensor
