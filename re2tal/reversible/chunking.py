"""Runs branches in pieces, so that only the activations of one piece are alive at once.

    forward     for every piece:  x[i+1][piece]  = x[i-1][piece] + F(x[i][piece])
    backward    for every piece:  runs F(x[i][piece]) again, subtracts it from x[i+1][piece], differentiates it

Both directions must be cut to save memory: if only the forward were, the activations of all pieces would be alive in
backward.

Every piece gives a part of each parameter's gradient, but a gradient hook must fire once: DDP and ZeRO-2 raise when it
fires again, and ZeRO-3 silently trains something else. Therefore all pieces but the last are differentiated by
`autograd.grad` into sums, and hooks add these to the last piece's gradients on their way into the leaves
(`GradientSums`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
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
    """A part of a state. The same part of the branch's output depends on nothing else."""

    axis: int
    """The axis of the state that is cut."""
    spans: tuple[Span, ...]
    """The stretches of the axis that belong to the piece; the spans of all pieces cover the axis once."""
    function: Callable[[Tensor], Tensor]
    """The branch on the spans, concatenated along the axis."""

    @property
    def size(self) -> int:
        """Length along the axis."""
        return sum(stop - start for start, stop in self.spans)

    def take(self, state: Tensor) -> Tensor:
        """The piece of `state`: a view where it is one span."""
        views = self._views(state)
        return views[0] if len(views) == 1 else torch.cat(views, self.axis)

    def add_to(self, state: Tensor, update: Tensor, add: Callable[[Tensor, Tensor], object] = Tensor.add_) -> None:
        """Adds `update`, which has the size of the piece, to this part of `state` in place, as `add` does it."""
        for view, part in zip(self._views(state), self._parts(update), strict=True):
            add(view, part)

    def _views(self, state: Tensor) -> list[Tensor]:
        return [state.narrow(self.axis, start, stop - start) for start, stop in self.spans]

    def _parts(self, update: Tensor) -> Sequence[Tensor]:
        return update.split([stop - start for start, stop in self.spans], self.axis)


@dataclass(frozen=True, slots=True)
class WholeBranch:
    """A branch with a name for errors and, if it ends in one, its last linear layer. Call it to run it."""

    name: str
    function: Callable[[Tensor], Tensor]
    last: nn.Linear | None = None
    """The layer whose output the branch returns, after dropout and drop-path at most, and uses for nothing else.
    Backward skips it where forward saved the output."""

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
    """The pieces of a state, chosen by shape, dtype and device alone. With one piece or none the branch runs whole."""
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
    """The pieces that decide the peak memory of all of them, if no piece leaves anything behind.

    These are the first and the last, which may differ from the others, and the largest in between. The ones just before
    the largest and the last belong to it too, because their memory is partly still in use then.
    """
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
    """Sums the parameters' gradients over the pieces of one branch, and delivers each sum to its leaf once."""

    sums: dict[Tensor, Tensor] = field(default_factory=dict)
    delivers: bool = False
    """Whether the last piece is being differentiated."""

    def collect(self, output: GradientEdge, gradient: Tensor, point: Tensor) -> None:
        """Differentiates a piece without touching the leaves: adds to the sums, and sets `point.grad`."""
        edges = _leaves(output)
        hooks = {leaf: partial(self._take, leaf) for leaf in edges if leaf is not point}
        with silenced(list(edges)), _hooked(hooks):
            found = torch.autograd.grad((output,), tuple(edges.values()), (gradient,), allow_unused=True)
        point.grad = dict(zip(edges, found, strict=True)).get(point)

    def _take(self, leaf: Tensor, part: Tensor | None) -> Tensor | None:
        """A hook that adds `part` to the sum of `leaf` as soon as it exists, and replaces it by an expanded zero.

        `autograd.grad` holds what hooks return until it ends. Late in a network a branch's parameters are larger than
        its states, so it must not hold their gradients.
        """
        # `Linear` returns None for a weight's gradient that `add_product` has added already.
        if part is None:
            return None
        self.add(leaf, part)
        return part.new_zeros(()).expand_as(part)

    def add(self, leaf: Tensor, part: Tensor) -> None:
        """Adds a part of the gradient of `leaf`."""
        if leaf in self.sums:
            self.sums[leaf].add_(part)
        else:
            # In float32, because a sum of many bfloat16 numbers is far off. Always a copy, because autograd gives the
            # same tensor to several leaves, or the gradient of a state itself, where a branch only adds a parameter.
            self.sums[leaf] = part.to(torch.promote_types(part.dtype, torch.float32), copy=True)

    def add_product(self, leaf: Tensor, left: Tensor, right: Tensor) -> Tensor | None:
        """Adds a product to a leaf's sum without writing it first; returns the sum once it is complete."""
        # Taken out, because autograd gets the complete sum as this gradient, and `_complete` must not add it again.
        total = self.sums.pop(leaf, None)
        total = left @ right if total is None else total.addmm_(left, right)
        if self.delivers:
            return total
        self.sums[leaf] = total
        return None

    def deliver(self, output: GradientEdge, gradient: Tensor) -> None:
        """Runs a real backward of the last piece, where each leaf, and each hook on it, gets the sum of all pieces.

        Raises RuntimeError if a leaf that other pieces use has no part in this one: its sum would be lost.
        """
        if lost := len(self.sums.keys() - _leaves(output).keys()):
            raise RuntimeError(
                f"the last piece of a branch does not use {lost} of the parameters that other pieces use; "
                "every piece of a cut must use the same parameters"
            )
        self.delivers = True
        with self.completing():
            torch.autograd.backward((output,), (gradient,))

    def completing(self) -> AbstractContextManager[None]:
        """Inside, the gradient of each leaf gets its sum added before any hook sees it."""
        return _hooked({leaf: partial(self._complete, leaf) for leaf in self.sums})

    def _complete(self, leaf: Tensor, part: Tensor) -> Tensor:
        return self.sums.pop(leaf).add_(part).to(part.dtype) if leaf in self.sums else part


def _leaves(output: GradientEdge) -> dict[Tensor, GradientEdge]:
    """The leaves that `output` was computed from, with their edges.

    Edges, because `autograd.grad` to an edge gives the full shape of a parameter that ZeRO-3 has partitioned since.
    """
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
def silenced(leaves: Sequence[Tensor]) -> Iterator[None]:
    """Inside, hooks on `leaves` do not fire: they would see parts of a gradient. They come back behind new ones."""
    kinds = ("_backward_hooks", "_post_accumulate_grad_hooks")
    hooks = [(found, dict(found)) for leaf in leaves for kind in kinds if (found := getattr(leaf, kind))]
    for registered, _ in hooks:
        # In place, because autograd holds this very dictionary.
        registered.clear()
    try:
        yield
    finally:
        for registered, those in hooks:
            registered.update(those)


@contextmanager
def _hooked(hooks: Mapping[Tensor, Callable[[Tensor], Tensor | None]]) -> Iterator[None]:
    """Inside, the gradient of a leaf goes through the hook given here before any other hook sees it."""
    # Hooks fire in the order of registration. Taking the others out and putting them back makes ours the first.
    with silenced(list(hooks)):
        handles = [leaf.register_hook(hook) for leaf, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
