"""Finds what a branch leaves behind beside its output: such a tensor would have a gradient, which a run cannot give it.

    self.logits = self.router(x)      an attribute, an entry of a list, what a hook collects (`output_attentions`)
    loss = task + balance(logits)     forward ran without a graph, so the router would learn nothing from the balance

While a branch is checked, every result of torch that depends on its input or on trained parameters, other than through
`detach` or `no_grad`, is noted by a weak reference. Those alive when the branch has ended are kept by somebody.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from re2tal.reversible.fake import is_counted
from re2tal.rewire.pending import RewireError

_WITHOUT_GRADIENT = (
    "_like",
    "detach",
    "detach_",
    "new_tensor",
    "new_zeros",
    "new_ones",
    "new_empty",
    "new_full",
    "data",
)
_OF_THE_FIRST = ("to", "type_as", "expand_as", "view_as", "reshape_as")
"""Of the other tensor they take the form only."""


def checked_for_escapes(function: Callable[[Tensor], Tensor], name: str) -> Callable[[Tensor], Tensor]:
    """`function`, a branch called `name`, which raises RewireError if it leaves anything behind.

    Where a graph is kept there is nothing to find: what is left behind has its gradient.
    """

    def checked(x: Tensor) -> Tensor:
        if torch.is_grad_enabled() or is_counted(x):
            return function(x)
        given, escapes = x.detach(), _Escapes()
        escapes.made[given] = "its input"
        with torch.enable_grad(), escapes:  # on, so that a no_grad of the branch's own shows
            output = function(given)
        # Another tensor of the same memory: the one that the branch returned is alive only if somebody keeps it.
        output = output.detach() if isinstance(output, Tensor) else output
        del given
        for _ in range(2):
            left = [f"{made}, of shape {tuple(tensor.shape)}" for tensor, made in escapes.made.items()]
            if not left:
                return output
            gc.collect()
        raise RewireError(
            f"{name} leaves a tensor behind (from {left[0]}): an attribute, a list, or a hook that collects outputs "
            "(output_attentions, router logits) keeps it. A loss would give it a gradient, which a reversible run "
            "cannot pass on: do without it, detach it where it is kept, or set recompute=False"
        )

    return checked


def is_compiled(block: nn.Module) -> bool:
    """Whether anything inside is compiled: it would be compiled once more to be checked."""
    return any(module._compiled_call_impl is not None or hasattr(module, "_orig_mod") for module in block.modules())


class _Escapes(TorchFunctionMode):
    """While it is entered: `made` has what depends on its first entries, or on parameters, and what made it."""

    def __init__(self) -> None:
        super().__init__()
        self.made: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs `func` without a graph, as a run does."""
        wanted = torch.is_grad_enabled()
        name = getattr(func, "__name__", "")
        name = func.__self__.__name__ if name == "__get__" else name  # type: ignore[attr-defined]
        if name == "_set_grad_enabled":
            return func(*args, **(kwargs or {}))
        with torch.no_grad():
            output = func(*args, **(kwargs or {}))
        if wanted and not name.endswith(_WITHOUT_GRADIENT):
            sources = args[:1] if name in _OF_THE_FIRST else (args, kwargs)
            if any(one.requires_grad or one in self.made for one in _floating(sources)):
                targets = args[:1] if name == "__setitem__" else output
                self.made.update((one, name) for one in _floating(targets) if not isinstance(one, nn.Parameter))
        return output


def _floating(values: Any) -> Iterator[Tensor]:
    tensors = (leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor))
    return (one for one in tensors if one.is_floating_point() or one.is_complex())
