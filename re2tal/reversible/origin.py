"""Of what a tensor can be made again, so that a layer that needs it in backward need not keep it.

    y = merge(x[n-1], x[n])      the run that returned y keeps these two states, and y need not be kept beside them

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
"""From the tensor that has the origin to one of its tensors, if that is still there."""


class Origin(NamedTuple):
    """Tensors that somebody keeps anyway, and what makes another one of them."""

    tensors: tuple[Tensor, ...]
    make: Callable[..., Tensor]
    """Returns the same bits as the first time."""

    @classmethod
    def of(cls, tensor: Tensor) -> Origin | None:
        """That of a tensor which was given one, if it is still there and nobody has written to the tensor since.

        An alias of that tensor has it too, as ZeRO-3 makes one of what a module returns; one that autograd does not
        follow back to it, a leaf, has none, because whoever needs it may do so when the other tensors are gone.
        """
        if _hooked() or tensor.is_leaf:
            return None
        found = getattr(tensor.untyped_storage(), _NAME, None)
        if found is None:
            return None
        references, make, values = found
        tensors = tuple(one for reference in references if (one := reference(tensor)) is not None)
        return cls(tensors, make) if values == _values(tensor) and len(tensors) == len(references) else None


def with_origin(tensor: Tensor, tensors: Sequence[Tensor], make: Callable[..., Tensor]) -> Tensor:
    """`tensor`, which `make` makes of `tensors`."""
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


def kept(*tensors: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """Keeps tensors as autograd does, and gives them back: hooks on saved tensors see them, and a RuntimeError tells if
    they were written to in between."""
    node: Any = _Keep.apply(torch.empty(0, requires_grad=True), *(tensor.detach() for tensor in tensors)).grad_fn
    return lambda: node.saved_tensors


class _Keep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return anchor.new_empty(0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        raise AssertionError("nothing follows from what is only kept")


def _with_references(tensor: Tensor, references: Sequence[_Reference], make: Callable[..., Tensor]) -> Tensor:
    if not _hooked():
        setattr(tensor.untyped_storage(), _NAME, (references, make, _values(tensor)))
    return tensor


def _values(tensor: Tensor) -> tuple:
    """Equal for tensors of the same values, among those that share a storage."""
    return tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset(), tensor._version


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
    reference = TensorWeakRef(tensor)
    return lambda _: reference()


def _part(dim: int, start: int, size: int, whole: Tensor) -> Tensor:
    return whole.detach().narrow(dim, start, size).clone()


def _itself(tensor: Tensor) -> Tensor:
    return tensor
