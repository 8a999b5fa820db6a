"""What lies between reversible runs, stems, mergings, blocks that change resolution, forgets what is inside it as well.

    a run                            keeps two states, whatever its depth
    a convolution, its norm, ReLU    keep three tensors, each as large as a state

In a network that was rewired to recompute, such layers keep their inputs alone, and run once more in backward. This is
checkpointing, non-reentrant, so that DeepSpeed and DDP see one backward of each; what they write to buffers is written
once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from re2tal.reversible.surroundings import BufferWatch, held


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
    """`function(*args, **kwargs)`, which keeps nothing but these; `owner` holds the buffers that it may write."""
    written: list[Tensor] | None = None

    def run(*args: Any, **kwargs: Any) -> Any:
        nonlocal written
        if written is not None:
            with held(written):
                return function(*args, **kwargs)
        watch = BufferWatch(owner)
        output = function(*args, **kwargs)
        written = watch.written()
        return output

    return checkpoint(run, *args, use_reentrant=False, **kwargs)
