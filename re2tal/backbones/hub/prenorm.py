"""Branches of the pre-norm block that nearly all vision transformers share; only the names of its parts differ.

    x = x + end(attention(norm(x), ...));  x = x + end(mlp(norm(x)))

Parts are called as modules, one by one, so that hooks run. If a part adds to its input itself, name its own parts
instead ("output.dense", "output.dropout"). The memory that branches need inside was measured on VideoMAE-S.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any

from torch import Tensor, nn

from re2tal.rewire import Branch, by_samples


def attention_branch(norm: str, attention: str, *end: str, last: str | None = None) -> Branch:
    """x -> norm -> attention, with the block's other arguments -> the parts of `end` in turn; `last` is as in
    `Branch`."""

    def attend(block: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        attended = attrgetter(attention)(block)(attrgetter(norm)(block)(x), *args, **kwargs)
        return _through(block, attended[0] if isinstance(attended, tuple) else attended, end)

    return Branch("attention", attend, cut=by_samples(inner_states=9), last=last)


def mlp_branch(*parts: str, last: str | None = None) -> Branch:
    """x through the parts in turn; `last` is as in `Branch`."""

    def transform(block: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return _through(block, x, parts)

    return Branch("mlp", transform, cut=by_samples(inner_states=15), last=last)


def _through(block: nn.Module, x: Tensor, parts: tuple[str, ...]) -> Tensor:
    for part in parts:
        x = attrgetter(part)(block)(x)
    return x
