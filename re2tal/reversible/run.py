"""The branches of one run and how its states follow from each other: used by plain autograd, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from re2tal.reversible.buffers import SavedBuffer
from re2tal.reversible.chunking import ChunkedBranch, Piece, decisive, last_of, pieces_of
from re2tal.reversible.coupling import Coupling, Merge
from re2tal.reversible.fake import is_counted
from re2tal.reversible.monitor import Observation
from re2tal.reversible.precision import StateFormat
from re2tal.reversible.rng import GeneratorState

BranchFunction = Callable[[Tensor], Tensor]

Update = Callable[[int, BranchFunction, Tensor], Tensor]
"""(i, F_i or a piece of it, x[i] or the same piece of it) -> what is added, rounded, to x[i-1] to get x[i+1]."""


def _draws_of_pieces(branch: BranchFunction, device: torch.device) -> Iterator[AbstractContextManager[None]]:
    """Yields a context for each piece. Pieces that share their draws all start from the generators' first state."""
    start = GeneratorState.now(device) if isinstance(branch, ChunkedBranch) and branch.same_draws else None
    # The first piece runs without a replay, so that the generators move on as they would for a whole branch.
    yield nullcontext()
    while True:
        yield start.replayed() if start else nullcontext()


@dataclass(frozen=True, slots=True)
class Run:
    """Branches, and how they are coupled."""

    branches: tuple[BranchFunction, ...]
    rebuilt: int
    """How many branches, from the first, are run again in backward; those behind them save their graphs."""
    saved_outputs: int
    """How many of the rebuilt branches save their output."""
    saved_attention: int
    """How many of the rebuilt branches, from the first that has one, save what their attention kernels return."""
    merge: Merge
    coupling: Coupling
    precision: StateFormat
    streams: int | None = None
    """The axis along which x[-1] and x[0] lie side by side in x, and x[n-1] and x[n] in the output: nothing is merged.
    None for a run that starts with x alone."""

    def check_streams(self, x: Tensor) -> None:
        """Raises ValueError where `x` does not hold two streams that sums couple."""
        if self.streams is not None and (not self.coupling.is_sum or x.shape[self.streams] % 2):
            raise ValueError(
                f"two streams are coupled by sums, and lie side by side along axis {self.streams}; x has shape "
                f"{tuple(x.shape)}, and is coupled by {self.coupling}"
            )

    def saved_states(self) -> list[int]:
        """Indices of the states that are saved for backward, in rising order. Backward rebuilds the others."""
        return self.coupling.saved_states(self.rebuilt, room=self.precision.room)

    def branches_saving_output(self) -> list[int]:
        """Indices of the branches that save their output.

        A branch i whose x[i-1] is saved is left out: nothing is rebuilt there, so its output is not needed.
        """
        # -1, because x[-1] is x[0]: at the first branch there is nothing to rebuild.
        saved = {-1, *self.saved_states()}
        lasts = {index: last_of(self.branches[index]) for index in range(self.rebuilt) if index - 1 not in saved}
        sizes = {index: last.in_features * last.out_features for index, last in lasts.items() if last is not None}
        # Every saved output costs one state, so the largest layers are skipped first: they save the most time.
        return sorted(sizes, key=lambda index: (sizes[index], index), reverse=True)[: self.saved_outputs]

    def states(
        self, x: Tensor, update: Update, *, saved: Collection[int] = (), observation: Observation | None = None
    ) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """Returns x[0], x[n-1], x[n], and the list of the states in `saved`.

        Without autograd, x[i+1] reuses the buffer of x[i-1], unless that state is saved, or is the input of a branch
        that saves its graph.
        """
        older, newer = (x, x) if self.streams is None else x.chunk(2, self.streams)
        start = previous = current = self.precision.state(newer)
        if self.streams is not None:
            previous = self.precision.state(older)
        # Must survive the run: the caller's x, which may be the first state itself, or x[0], which "extrapolate"
        # subtracts.
        needed = x if self.merge == "mean" else start
        found = []
        for index in range(len(self.branches)):
            if index in saved:
                found.append(current)
            if observation is not None:
                observation.see(index, current)
            # x[i-1] must survive if it is also x[i] (at the start), if the merge needs it, if it is saved, or if the
            # saved graph of branch i-1 holds it.
            lent = previous is current or previous is needed or index - 1 in saved or index > self.rebuilt
            lent = lent or (self.streams is not None and index < 2)  # they may be views of x
            owned = not (torch.is_grad_enabled() or lent)
            previous, current = current, self.following(index, previous, current, update, owned=owned)
        if len(self.branches) in saved:
            found.append(current)
        if observation is not None:
            observation.see(len(self.branches), current)
        return start, previous, current, found

    def following(self, index: int, previous: Tensor, current: Tensor, update: Update, *, owned: bool) -> Tensor:
        """x[i-1], x[i] -> x[i+1]; overwrites x[i-1] if `owned`."""
        branch = self.branches[index]
        pieces = self.pieces(index, current)
        precision = self.precision
        # One sum, which autograd can record. On a grid, rounding is fused with the sum, below.
        if not pieces and (torch.is_grad_enabled() or precision.grid is None):
            increment = precision.increment(precision.round(update(index, branch, current)))
            return self.coupling.advance(previous, current, increment, owned=owned)
        if not pieces:
            whole = update(index, branch, current)
            return precision.add(self.coupling.carried(previous, current, owned=owned), whole)
        following = self.coupling.carried(previous, current, owned=owned)
        for piece, draws in zip(pieces, _draws_of_pieces(branch, current.device), strict=False):
            with draws:
                # The update gets no name, which would keep it alive while the next one is computed.
                piece.add_to(following, update(index, piece.function, piece.take(current)), precision.add)
        return following

    def pieces(self, index: int, state: Tensor) -> Sequence[Piece]:
        """The pieces in which F_i runs on `state`; () for whole.

        Where only bytes are counted and pieces leave nothing behind, only those that decide the peak are returned.
        """
        pieces = pieces_of(self.branches[index], state)
        may_save = self.saved_attention > 0 or index >= self.rebuilt or index in self.branches_saving_output()
        return decisive(pieces) if is_counted(state) and not may_save else pieces

    def output(self, index: int, function: BranchFunction, state: Tensor) -> Tensor:
        """F_i of x[i], or of a piece of it, not rounded yet.

        Raises ValueError if the branch writes to its input, changes shape or widens the dtype.
        """
        given = self.precision.real(state).to(self.precision.branches)
        if given is state and state.is_inference():
            given = state.clone()  # inference tensors count no versions, so a write to the state would not be noticed
        version = None if given.is_inference() else given._version
        output = function(given)
        if version is not None and given._version != version:
            raise ValueError(f"{self._name(index)} writes to its input, a state of the run; let it write to a copy")
        if not isinstance(output, Tensor) or output.shape != state.shape:
            returned = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(
                f"{self._name(index)} turns a tensor of shape {tuple(state.shape)} into {returned}; a residual branch "
                "returns one tensor of the shape of its input: leave this one outside the run"
            )
        if torch.promote_types(output.dtype, self.precision.branches) != self.precision.branches:
            raise ValueError(
                f"{self._name(index)} turns {self.precision.branches} into {output.dtype}; a residual branch keeps the "
                "dtype of its input: convert its output, or leave it outside the run"
            )
        return output

    def refuse_writing_piece(self, index: int, saved: Sequence[SavedBuffer]) -> None:
        """Raises ValueError where a later piece of branch `index` has written one of the buffers saved before it."""
        if written := [one for one in saved if one.differs()]:
            raise ValueError(
                f"{self._name(index)} is run in pieces, and each of them writes {written[0].name} of a "
                f"{type(written[0].module).__name__}, a buffer, which the whole branch writes once; run it whole "
                "(leave chunk_mebibytes out)"
            )

    def saves_its_ends(self) -> bool:
        """Whether the output can be recomputed from the states that the run saves."""
        length = len(self.branches)
        return (
            self.merge == "mean"  # "extrapolate" also needs x, which is not saved
            and self.streams is None
            and self.rebuilt == length
            and {length - 1, length} <= set(self.saved_states())
        )

    def merged(self, start: Tensor, previous: Tensor, current: Tensor) -> Tensor:
        """The output of the run, from x[0], x[n-1] and x[n]."""
        start, previous, current = (self.precision.real(state) for state in (start, previous, current))
        if self.streams is not None:
            return torch.cat((previous, current), self.streams).to(self.precision.output)
        return self.coupling.merged(start, previous, current, merge=self.merge).to(self.precision.output)

    def mean(self, previous: Tensor, current: Tensor) -> Tensor:
        """The output of a run whose merge is "mean": that does not use x."""
        return self.merged(previous, previous, current)

    def _name(self, index: int) -> str:
        branch = self.branches[index]
        return f"branch {index} ({getattr(branch, 'name', None) or getattr(branch, '__name__', type(branch).__name__)})"
