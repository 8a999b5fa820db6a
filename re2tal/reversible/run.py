"""The branches of one run, and how its states follow: shared by plain autograd, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from re2tal.reversible.chunking import ChunkedBranch, Piece, decisive, last_of, pieces_of
from re2tal.reversible.coupling import Coupling, Merge
from re2tal.reversible.fake import is_counted
from re2tal.reversible.monitor import Observation
from re2tal.reversible.precision import Precision
from re2tal.reversible.rng import GeneratorState

BranchFunction = Callable[[Tensor], Tensor]

Update = Callable[[int, BranchFunction, Tensor], Tensor]
"""i, F_i or a piece of it, x[i] or the same piece of it -> what that adds to x[i-1]."""


def _draws_of_pieces(branch: BranchFunction, device: torch.device) -> Iterator[AbstractContextManager[None]]:
    """Around each piece in turn: the generators as they stand, or as they stood before the first one."""
    start = GeneratorState.now(device) if isinstance(branch, ChunkedBranch) and branch.same_draws else None
    yield nullcontext()
    while True:
        yield start.replayed() if start else nullcontext()


@dataclass(frozen=True, slots=True)
class Run:
    """Branches, and how they are coupled."""

    branches: tuple[BranchFunction, ...]
    rebuilt: int
    """How many branches forget their activations; those behind them keep theirs."""
    known: int
    """How many of those keep what they added."""
    merge: Merge
    coupling: Coupling
    precision: Precision

    def kept(self) -> list[int]:
        """Which of the states before rebuilt branches backward gets, in rising order: the others it rebuilds."""
        return self.coupling.kept(self.rebuilt, room=self.precision.room)

    def known_branches(self) -> list[int]:
        """Which branches keep what they added: not those behind a kept state, before which nothing is rebuilt."""
        kept = {-1, *self.kept()}
        lasts = {index: last_of(self.branches[index]) for index in range(self.rebuilt) if index - 1 not in kept}
        sizes = {index: last.in_features * last.out_features for index, last in lasts.items() if last is not None}
        return sorted(sizes, key=lambda index: (sizes[index], index), reverse=True)[: self.known]

    def states(
        self, x: Tensor, update: Update, *, kept: Collection[int] = (), observation: Observation | None = None
    ) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """x[0], x[n-1] and x[n], and those that are to be kept.

        Where autograd does not watch, x[i+1] takes the buffer of x[i-1], unless it is kept or a stored branch's input.
        """
        start = previous = current = self.precision.state(x)
        needed = x if self.merge == "mean" else start
        found = []
        for index in range(len(self.branches)):
            if index in kept:
                found.append(current)
            if observation is not None:
                observation.see(index, current)
            lent = previous is current or previous is needed or index - 1 in kept or index > self.rebuilt
            owned = not (torch.is_grad_enabled() or lent)
            previous, current = current, self.following(index, previous, current, update, owned=owned)
        if len(self.branches) in kept:
            found.append(current)
        return start, previous, current, found

    def following(self, index: int, previous: Tensor, current: Tensor, update: Update, *, owned: bool) -> Tensor:
        """x[i-1], x[i] -> x[i+1]; in the buffer of x[i-1] where it is owned."""
        branch = self.branches[index]
        pieces = self.pieces(index, current)
        # Updates get no name here: with one they would live on while the next one is computed.
        if not pieces:
            increment = self.precision.increment
            return self.coupling.advance(previous, current, increment(update(index, branch, current)), owned=owned)
        following = self.coupling.carried(previous, current, owned=owned)
        for piece, draws in zip(pieces, _draws_of_pieces(branch, current.device), strict=False):
            with draws:
                piece.add_to(following, self.precision.increment(update(index, piece.function, piece.take(current))))
        return following

    def pieces(self, index: int, state: Tensor) -> Sequence[Piece]:
        """In which F_i is run on `state`; () for whole. Where only bytes count, those of which none is kept are few."""
        pieces = pieces_of(self.branches[index], state)
        forgotten = is_counted(state) and index < self.rebuilt and index not in self.known_branches()
        return decisive(pieces) if forgotten else pieces

    def update(self, index: int, function: BranchFunction, state: Tensor) -> Tensor:
        """F_i(x[i]), or of a piece of x[i], on the grid."""
        return self.precision.round(self.output(index, function, state))

    def output(self, index: int, function: BranchFunction, state: Tensor) -> Tensor:
        """The same as the branch returns it, checked."""
        output = function(self.precision.real(state).to(self.precision.branches))
        if not isinstance(output, Tensor) or output.shape != state.shape:
            given = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(
                f"{self._name(index)} turns a tensor of shape {tuple(state.shape)} into {given}; a residual branch "
                "returns one tensor of the shape of its input: leave this one outside the run"
            )
        if torch.promote_types(output.dtype, self.precision.branches) != self.precision.branches:
            raise ValueError(
                f"{self._name(index)} turns {self.precision.branches} into {output.dtype}; a residual branch keeps the "
                "dtype of its input: convert its output, or leave it outside the run"
            )
        return output

    def keeps_its_ends(self) -> bool:
        """Whether what the run returns can be made of the states that it keeps."""
        length = len(self.branches)
        return self.merge == "mean" and self.rebuilt == length and {length - 1, length} <= set(self.kept())

    def merged(self, start: Tensor, previous: Tensor, current: Tensor) -> Tensor:
        """What the run returns."""
        start, previous, current = (self.precision.real(state) for state in (start, previous, current))
        return self.coupling.merged(start, previous, current, merge=self.merge).to(self.precision.output)

    def mean(self, previous: Tensor, current: Tensor) -> Tensor:
        """What a run whose merge is "mean" returns: x is not in it."""
        return self.merged(previous, previous, current)

    def _name(self, index: int) -> str:
        branch = self.branches[index]
        return f"branch {index} ({getattr(branch, 'name', None) or getattr(branch, '__name__', type(branch).__name__)})"
