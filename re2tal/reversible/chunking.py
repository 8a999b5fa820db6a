"""Branches run in pieces, so that what one needs inside is no larger than a piece of it.

    forward     for every piece:  x[i+1][piece]  = x[i-1][piece] + F(x[i][piece])
    backward    for every piece:  runs F(x[i][piece]) again, takes it from x[i+1][piece] in place, differentiates it

Cutting the whole step is what saves memory: a forward alone that is cut leaves the activations of all pieces alive.

Every piece gives a part of each parameter's gradient, but a gradient hook must fire once: DDP and ZeRO-2 raise when it
fires again, and ZeRO-3 silently trains something else. All pieces but the last are therefore differentiated beside the
leaves, and what they gave is added to the gradient of the last one on its way into the leaf (`GradientSums`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

Span = tuple[int, int]
"""(start, stop) along an axis."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a state, which a branch maps to the same part of its output, whatever the rest holds."""

    axis: int
    """The axis of the state that is cut."""
    spans: tuple[Span, ...]
    """What of it belongs to the piece; the spans of all pieces cover it once."""
    function: Callable[[Tensor], Tensor]
    """The branch on the spans, put one behind the other along the axis."""

    @property
    def size(self) -> int:
        """How much of the axis it is."""
        return sum(stop - start for start, stop in self.spans)

    def take(self, state: Tensor) -> Tensor:
        """The piece of `state`: a view where it is one span."""
        views = self._views(state)
        return views[0] if len(views) == 1 else torch.cat(views, self.axis)

    def add_to(self, state: Tensor, update: Tensor) -> None:
        """Add `update`, which has the size of the piece, to it in place."""
        for view, part in zip(self._views(state), self._parts(update), strict=True):
            view.add_(part)

    def subtract_from(self, state: Tensor, update: Tensor) -> None:
        """The inverse of `add_to`."""
        for view, part in zip(self._views(state), self._parts(update), strict=True):
            view.sub_(part)

    def _views(self, state: Tensor) -> list[Tensor]:
        return [state.narrow(self.axis, start, stop - start) for start, stop in self.spans]

    def _parts(self, update: Tensor) -> Sequence[Tensor]:
        return update.split([stop - start for start, stop in self.spans], self.axis)


@dataclass(frozen=True, slots=True)
class WholeBranch:
    """A branch that is known to end in a linear layer, or that has a name for errors; call it to run it."""

    name: str
    function: Callable[[Tensor], Tensor]
    last: nn.Linear | None = None
    """The layer whose output, after dropout and drop-path at most, the branch returns; it is used nowhere else in it.
    Its output need not be computed again where what the branch adds is known."""

    def __call__(self, state: Tensor) -> Tensor:
        """The branch on a state."""
        return self.function(state)


@dataclass(frozen=True, slots=True)
class ChunkedBranch:
    """A branch that may be run in pieces; call it to run it whole."""

    name: str
    """For errors."""
    function: Callable[[Tensor], Tensor]
    """The branch on a whole state."""
    cut: Callable[[Tensor], Sequence[Piece]]
    """The pieces of a state; it looks at its shape, dtype and device alone. A single one, or none, leaves it whole."""
    same_draws: bool
    """Whether every piece starts from the same state of the random generators. So it must be where a piece holds a part
    of every sample, and a draw decides for a sample as a whole (drop-path); where pieces are samples, each draws anew.
    A branch that draws for every element (dropout) may be cut by samples only."""
    last: nn.Linear | None = None
    """As that of a `WholeBranch`."""

    def __call__(self, state: Tensor) -> Tensor:
        """The branch on a whole state."""
        return self.function(state)


def last_of(branch: Callable[[Tensor], Tensor]) -> nn.Linear | None:
    """The linear layer that `branch` is known to end in."""
    return branch.last if isinstance(branch, WholeBranch | ChunkedBranch) else None


def pieces_of(branch: Callable[[Tensor], Tensor], state: Tensor) -> Sequence[Piece]:
    """The pieces in which `branch` is to be run on `state`; () for whole."""
    pieces = branch.cut(state) if isinstance(branch, ChunkedBranch) else ()
    return pieces if len(pieces) > 1 else ()


def decisive(pieces: Sequence[Piece]) -> Sequence[Piece]:
    """Those that make the peak of all, if none leaves anything: the first and the last, which may differ from the
    others, the largest between them, and of these two the one before, of which something is there still."""
    between = range(1, len(pieces) - 1)
    largest = max(between, key=lambda index: (pieces[index].size, pieces[index - 1].size), default=0)
    last = len(pieces) - 1
    chosen = {0, largest - 1, largest, last - 1, last}
    return [piece for index, piece in enumerate(pieces) if index in chosen]


def even_spans(length: int, num: int) -> list[Span]:
    """0 .. length in `num` spans, or in `length` where that is fewer; their lengths differ by one at most.

    >>> even_spans(7, 3)
    [(0, 2), (2, 4), (4, 7)]
    """
    num = max(1, min(num, length))
    bounds = [length * index // num for index in range(num + 1)]
    return list(pairwise(bounds))


@dataclass(slots=True)
class GradientSums:
    """Gradients of the leaves that the pieces of one branch have in common, delivered to each leaf at once."""

    sums: dict[Tensor, Tensor] = field(default_factory=dict)
    delivers: bool = False
    """Whether the last piece is being differentiated."""

    def collect(self, output: GradientEdge, gradient: Tensor, point: Tensor) -> None:
        """Differentiates a piece beside the leaves: adds to the sums, and sets `point.grad`, the piece's input's."""
        edges = _leaves(output)
        hooks = {leaf: partial(self._add, leaf) for leaf in edges if leaf is not point}
        with _silenced(list(edges)), _hooked(hooks):
            found = torch.autograd.grad((output,), tuple(edges.values()), (gradient,), allow_unused=True)
        point.grad = dict(zip(edges, found, strict=True)).get(point)

    def _add(self, leaf: Tensor, part: Tensor | None) -> Tensor | None:
        """Adds as soon as there is something to add. What is returned in its place, which is kept until the end, is
        small: at the end of a network a branch's parameters outweigh its states."""
        if part is None:  # a product that was added already
            return None
        if leaf in self.sums:
            self.sums[leaf].add_(part)
        else:
            # In float32, because a sum of many bfloat16 numbers is far off. Always a copy, because autograd gives the
            # same tensor to several leaves, or the gradient of a state itself, where a branch only adds a parameter.
            self.sums[leaf] = part.to(torch.promote_types(part.dtype, torch.float32), copy=True)
        return part.new_zeros(()).expand_as(part)

    def add_product(self, leaf: Tensor, left: Tensor, right: Tensor) -> Tensor | None:
        """Adds a product to a leaf's sum without writing it first; returns the sum once it is complete."""
        total = self.sums.pop(leaf, None)
        total = left @ right if total is None else total.addmm_(left, right)
        if self.delivers:
            return total
        self.sums[leaf] = total
        return None

    def deliver(self, output: GradientEdge, gradient: Tensor) -> None:
        """A real backward of the last piece, in which every leaf's gradient, seen by its hooks, is that of all pieces.

        RuntimeError if a leaf that other pieces use has no part in this one: its sum would be lost.
        """
        if lost := len(self.sums.keys() - _leaves(output).keys()):
            raise RuntimeError(
                f"the last piece of a branch does not use {lost} of the parameters that other pieces use; "
                "every piece of a cut must use the same parameters"
            )
        self.delivers = True
        with _hooked({leaf: partial(self._complete, leaf) for leaf in self.sums}):
            torch.autograd.backward((output,), (gradient,))

    def _complete(self, leaf: Tensor, part: Tensor) -> Tensor:
        return self.sums.pop(leaf).add_(part).to(part.dtype) if leaf in self.sums else part


def _leaves(output: GradientEdge) -> dict[Tensor, GradientEdge]:
    """The leaves that `output` was made from, and their edges: of ZeRO-3's parameters these keep their full shape."""
    found: dict[Tensor, GradientEdge] = {}
    seen, waiting = {output.node}, [output.node]
    while waiting:
        node = waiting.pop()
        # Of nodes without predecessors only those that accumulate into a leaf have a variable.
        if not node.next_functions and hasattr(node, "variable"):
            found[node.variable] = GradientEdge(node, 0)
        new = {following for following, _ in node.next_functions if following is not None} - seen
        seen |= new
        waiting += new
    return found


@contextmanager
def _silenced(leaves: Sequence[Tensor]) -> Iterator[None]:
    """Hooks on the tensors `leaves` do not fire inside: `autograd.grad` would call them with the part of a piece."""
    hooks = [(leaf._backward_hooks, dict(leaf._backward_hooks)) for leaf in leaves if leaf._backward_hooks]
    for registered, _ in hooks:
        registered.clear()
    try:
        yield
    finally:
        for registered, those in hooks:
            registered.update(those)


@contextmanager
def _hooked(hooks: Mapping[Tensor, Callable[[Tensor], Tensor | None]]) -> Iterator[None]:
    """Inside, what flows into a leaf goes through its hook before any other hook sees it."""
    with _silenced(list(hooks)):  # hooks fire in the order in which they were put in
        handles = [leaf.register_hook(hook) for leaf, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
