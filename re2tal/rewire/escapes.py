"""Finds what a branch leaves behind beside its output: such a tensor would have a gradient, which a run cannot give it.

    self.logits = self.router(x)      an attribute, an entry of a list, what a hook collects (`output_attentions`)
    loss = task + balance(logits)     forward ran without a graph, so the router would learn nothing from the balance

While a branch is checked, every result of torch that depends on its input or on trained parameters, other than through
`detach` or `no_grad`, is noted by a weak reference. Those alive when the branch has ended are kept by somebody. What
custom autograd Functions return is noted too, and what transforms of `torch.func` hide. TorchScript is not looked into.
"""

from __future__ import annotations

import gc
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from threading import active_count, get_ident
from typing import Any

import numpy as np
import torch
from numpy.random import get_state, set_state
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from re2tal.reversible.buffers import SavedBuffer, buffers_restored, is_statistics, save_buffers
from re2tal.reversible.fake import is_counted
from re2tal.reversible.rng import GeneratorState
from re2tal.rewire.pending import RewireError

logger = logging.getLogger(__name__)

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
"""They use only the form of their other tensor, not its values."""


def checked_for_escapes(
    function: Callable[[Tensor], Tensor], name: str, *, repeated: nn.Module | None
) -> Callable[[Tensor], Tensor]:
    """`function`, a branch called `name`, which raises RewireError if it leaves anything behind.

    Where a graph is kept there is nothing to find: what is left behind has its gradient. `repeated` holds the buffers
    of a branch that must also give the same when it runs once more.
    """

    def checked(x: Tensor) -> Tensor:
        if torch.is_grad_enabled() or is_counted(x):
            return function(x)
        given, escapes, draws = x.detach(), _Escapes(), GeneratorState.now(x.device)
        others, buffers = other_generators(), _buffers_of(repeated)
        escapes.made[given] = "its input"
        try:
            with torch.enable_grad(), escapes, escapes.custom_functions():  # on, so that a no_grad of its own shows
                output = function(given)
        except RewireError:
            raise
        except RuntimeError as error:
            # A branch that differentiates something itself finds no graph here. If it is at fault, it fails once more.
            draws.restore()
            output = function(x)
            logger.warning("%s could not be checked for tensors that it leaves behind: %s", name, error)
            return output
        if other_generators() != others and active_count() == 1:  # other threads may have drawn
            raise RewireError(
                f"{name} draws from the generator of Python or of NumPy, with which backward could not run it again; "
                "draw from torch's, or set recompute=False"
            )
        # Another tensor of the same memory: the one that the branch returned is alive only if somebody keeps it.
        output = output.detach() if isinstance(output, Tensor) else output
        # Else this frame would keep the input alive, which counts as one that escaped.
        del given
        if repeated is not None and not isinstance(x, FakeTensor):
            _run_again(function, name, x, output, draws=draws, buffers=buffers)
        # What only a reference cycle keeps is no escape: it is gone after a collection.
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


def _buffers_of(module: nn.Module | None) -> list[SavedBuffer]:
    return [] if module is None else [one for inner in module.modules() for one in save_buffers(inner)]


def _run_again(
    function: Callable[[Tensor], Tensor],
    name: str,
    x: Tensor,
    output: Any,
    *,
    draws: GeneratorState,
    buffers: list[SavedBuffer],
) -> None:
    written = [one for one in buffers if one.was_written() or one.differs()]  # others must keep their version
    with draws.replayed(), buffers_restored({one.module for one in written}):
        for one in written:
            if not is_statistics(one.module):  # nor does backward restore these
                one.restore()
        again = function(x.detach())
    if isinstance(output, Tensor) and output.shape == again.shape:
        error, scale = (one.abs().max().double() for one in (output - again, output))
        if output.numel() and error > 2**10 * torch.finfo(output.dtype).eps * scale:
            raise RewireError(
                f"{name} gives another output when it runs again, {float(error / scale):.1e} of its largest element "
                "off: it reads an attribute or a cache that it writes, or draws from a generator of its own; correct "
                "it, or set recompute=False"
            )


def other_generators() -> tuple:
    """The states of the generators of Python and of NumPy."""
    return random.getstate(), *(state.tobytes() if hasattr(state, "tobytes") else state for state in get_state())


def restore_other_generators(states: tuple) -> None:
    """To what `other_generators` returned."""
    python, name, keys, *more = states
    random.setstate(python)
    set_state((name, np.frombuffer(keys, np.uint32), *more))


def is_compiled(block: nn.Module) -> bool:
    """Whether anything inside is compiled: it would be compiled once more to be checked."""
    return any(module._compiled_call_impl is not None or hasattr(module, "_orig_mod") for module in block.modules())


class _Escapes(TorchFunctionMode):
    """Inside, `made` maps each tensor that depends on its first entries, or on parameters, to what made it."""

    def __init__(self) -> None:
        super().__init__()
        self.made: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs `func` without a graph, as a run does."""
        name = getattr(func, "__name__", "")
        name = func.__self__.__name__ if name == "__get__" else name  # type: ignore[attr-defined]
        if name == "_set_grad_enabled":
            return func(*args, **(kwargs or {}))
        return self._noted(name, func, args, kwargs or {})

    def _noted(self, name: str, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        wanted = torch.is_grad_enabled()
        # Inside a transform of torch.func, no_grad would be the transformed function's own.
        transformed = torch._C._functorch.peek_interpreter_stack() is not None
        with nullcontext() if transformed else torch.no_grad():
            output = func(*args, **kwargs)
        if wanted and not name.endswith(_WITHOUT_GRADIENT):
            sources = args[:1] if name in _OF_THE_FIRST else (args, kwargs)
            if any(one.requires_grad or one in self.made for one in _floating(sources)):
                targets = args[:1] if name == "__setitem__" else output
                self.made.update((one, name) for one in _floating(targets) if not isinstance(one, nn.Parameter))
        return output

    @contextmanager
    def custom_functions(self) -> Iterator[None]:
        """Inside, autograd Functions that this thread applies are seen as one operation each."""
        usual, thread = vars(torch.autograd.Function)["apply"], get_ident()

        def apply(cls: type[torch.autograd.Function], *args: Any, **kwargs: Any) -> Any:
            run = usual.__get__(None, cls)
            return run(*args, **kwargs) if get_ident() != thread else self._noted(cls.__name__, run, args, kwargs)

        torch.autograd.Function.apply = classmethod(apply)  # type: ignore[assignment, method-assign]
        try:
            yield
        finally:
            torch.autograd.Function.apply = usual  # type: ignore[method-assign]


def _floating(values: Any) -> Iterator[Tensor]:
    """The tensors among `values`, and what those of torch.func wrap."""
    for leaf in tree_leaves(values):
        while isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex()):
            yield leaf
            if not torch._C._functorch.is_functorch_wrapped_tensor(leaf):
                break
            leaf = torch._C._functorch.get_unwrapped(leaf)
