"""How a branch of a block may be cut into parts that do not see each other, and how much of it is alive at once.

by_samples()    anything that treats samples independently: attention, convolutions, norms other than batch norm
by_tokens()     what treats positions independently, channels last: an MLP
Cut(...)        what a family knows about its own branches, such as windows of attention
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from re2tal.reversible.chunking import Span, even_spans


@dataclass(frozen=True, slots=True)
class Part:
    """What of a state one call gets."""

    axis: int
    """The axis of the state that is cut."""
    spans: tuple[Span, ...]
    """What of it belongs to the part, in the order in which the function takes it."""
    function: Callable[..., Tensor] | None = None
    """Called as the branch's is, with the part in the place of x; None for the branch's own."""


@dataclass(frozen=True, slots=True)
class Cut:
    """How a branch may be cut, and into how many parts."""

    parts: Callable[[nn.Module, torch.Size, int], Sequence[Part]]
    """(block, shape of its state, how many) -> that many parts, or as many as there can be."""
    inner_states: Callable[[nn.Module, torch.Size], float]
    """(block, shape of its state) -> how many times the size of its state the branch needs while differentiated."""
    samples: bool = False
    """Whether parts are samples; otherwise each holds a part of every sample. Then the branch may draw for a sample as
    a whole (drop-path), since all parts see the same draws, but not for every element (dropout)."""


def by_samples(inner_states: float) -> Cut:
    """Along the first axis, for a branch that needs `inner_states` times the size of its state inside."""

    def parts(block: nn.Module, shape: torch.Size, num: int) -> list[Part]:
        return [Part(0, (span,)) for span in even_spans(shape[0], num)]

    return Cut(parts, lambda block, shape: inner_states, samples=True)


def by_tokens(inner_states: float) -> Cut:
    """Along the longest axis between the samples, which come first, and the channels, which come last."""

    def parts(block: nn.Module, shape: torch.Size, num: int) -> list[Part]:
        axis = max(range(1, len(shape) - 1), key=lambda axis: shape[axis])
        return [Part(axis, (span,)) for span in even_spans(shape[axis], num)]

    return Cut(parts, lambda block, shape: inner_states)
