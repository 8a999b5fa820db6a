"""What a block adds to its input: a residual block is a chain x -> x + F_1(x) -> ... of branches F.

A family of networks says so once per type of block, beside that block:

    class Block(nn.Module):
        def attend(self, x, mask): return self.drop_path(self.attention(self.norm1(x), mask))
        def transform(self, x, mask): return self.drop_path(self.mlp(self.norm2(x)))
        def forward(self, x, mask):
            x = x + self.attend(x, mask)
            return x + self.transform(x, mask)

    @residual_branches.register
    def _(block: Block) -> tuple[Branch, ...]:
        return Branch("attention", Block.attend), Branch("mlp", Block.transform)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import singledispatch
from types import FunctionType
from typing import Any

from torch import Tensor, nn

from re2tal.rewire.cuts import Cut
from re2tal.rewire.hooks import hooked_inside
from re2tal.rewire.kinks import holds_kinks


@dataclass(frozen=True, slots=True)
class Branch:
    """One residual function of a type of blocks."""

    name: str
    """What it does, for reports and errors: "attention"."""
    function: Callable[..., Tensor]
    """(block, x, *what else the block is called with) -> what the block adds to x. It takes the block, and holds none,
    so that a copied network uses its own parameters."""
    through_block: bool = False
    """Whether it uses parameters that belong to the block itself, not to a module inside. It is then run inside a call
    of the block, because ZeRO-3 gathers a module's own parameters when that module is called."""
    cut: Cut | None = None
    """How it may be run in pieces; None for only as a whole."""
    kinks: bool = False
    """Whether its slope jumps somewhere, as ReLU's does; see `kinks`. Where a layer inside the block is an nn.ReLU or
    the like, this need not be said."""
    last: str | None = None
    """Path in the block of the nn.Linear whose output it returns, after dropout and drop-path at most. That output is
    in no gradient, and need not be computed again where it was saved."""

    def last_in(self, block: nn.Module) -> nn.Linear | None:
        """That layer; None where another type took its place, or something was put around it: either may do more.

        So it is with hooks inside the block, which may look at what it returns.
        """
        if self.last is None or hooked_inside((block,)):
            return None
        found = dict(block.named_modules(remove_duplicate=False)).get(self.last)
        return found if type(found) is nn.Linear else None


@singledispatch
def residual_branches(block: nn.Module) -> tuple[Branch, ...]:
    """The branches of `block`, in the order in which it adds them; () where it is not residual.

    Register one function per type of block. It sees the instance, so a type may be residual in some places only: a
    block that changes width or resolution answers ().
    """
    return ()


@singledispatch
def why_not_residual(block: nn.Module) -> str:
    """Why `residual_branches(block)` is (), in words for a report. Register it where there is more to say."""
    if _registered_type(block) is object:
        return f"nothing is registered for {type(block).__name__}"
    return f"this {type(block).__name__} does not add to its input"


@singledispatch
def wrap_output(block: nn.Module, x: Tensor) -> Any:
    """`x` in the form in which `block` returns it. Register it for blocks that return more than their hidden state."""
    return x


def hidden_state(output: Any) -> Any:
    """The hidden state in what a block returns: all of it, or the first of a tuple."""
    return output[0] if isinstance(output, tuple) else output


@singledispatch
def stream_axis(block: nn.Module) -> int | None:
    """Register it for blocks that were born reversible: y1 = x1 + F(x2), y2 = x2 + G(y1). It is the axis along which
    their two streams lie side by side, in what they are given and in what they return. Such blocks compute the same
    rewired, whatever `RewiringConfig` says."""
    return None


@dataclass(frozen=True, slots=True)
class Residual:
    """A block that is x -> x + F(x), once or more."""

    branches: tuple[Branch, ...]
    wrap: Callable[[nn.Module, Tensor], Any]
    """(block, x) -> x in the form in which the block returns it."""
    kinks: bool
    """Whether the slope of a branch jumps somewhere."""
    streams: int | None = None
    """Its `stream_axis`."""


@dataclass(frozen=True, slots=True)
class NotResidual:
    """A block that must run as it is."""

    reason: str
    as_a_whole: bool = False
    """Whether it could be one branch, with `unit` "block"."""


def registered(block: nn.Module) -> Residual | NotResidual:
    """What the registrations say about `block`.

    A subclass with a `forward`, or another method, of its own is no longer the block that its parent's registration
    describes.
    """
    if changed := _changed_since_registered(block):
        kind = _registered_type(block).__name__
        reason = f"{type(block).__name__} changes the {changed} of {kind}, so it needs its own registration"
        return NotResidual(reason)
    branches = residual_branches(block)
    if not branches:
        return NotResidual(why_not_residual(block))
    kinks = any(branch.kinks for branch in branches) or holds_kinks(block)
    return Residual(branches, wrap_output, kinks=kinks, streams=stream_axis(block))


def is_unregistered(block: nn.Module) -> bool:
    """Whether no registration speaks about the forward of `block`."""
    return _registered_type(block) is object or bool(_changed_since_registered(block))


def _changed_since_registered(block: nn.Module) -> str:
    """The name of a method that `block` has in another form than the registered type; empty where there is none."""
    kind = _registered_type(block)
    names = {name for one in kind.__mro__ if one not in nn.Module.__mro__ for name in vars(one)} | {"forward"}
    for name in sorted(name for name in names if not name.startswith("__")):
        method = getattr(kind, name, None)
        of_instance = name != "forward" and name in vars(block)
        if isinstance(method, FunctionType) and (of_instance or getattr(type(block), name) is not method):
            return name
    return ""


def is_explained(module: nn.Module) -> bool:
    """Whether somebody registered `why_not_residual` for its type."""
    return why_not_residual.dispatch(type(module)) is not why_not_residual.dispatch(object)


def _registered_type(block: nn.Module) -> type:
    return next(kind for kind in type(block).__mro__ if kind in residual_branches.registry)
