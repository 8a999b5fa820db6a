"""What a model returns, leaf by leaf, so that two forms of it can be compared."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from re2tal.rewire.discover import Example, call_model
from re2tal.rewire.pending import values_of


class Output(NamedTuple):
    """A leaf of what a model returns."""

    path: str
    leaf: Any
    has_gradient: bool


def outputs_of(model: nn.Module, example: Example) -> list[Output]:
    """Every leaf of what `model` returns on an example, with the same draws each time.

    Raises ValueError where it does not run.
    """

    def output(path: str, leaf: Any) -> Output:
        if not isinstance(leaf, Tensor):
            return Output(path, leaf, has_gradient=False)
        leaf = values_of(leaf)
        return Output(path, leaf.detach(), has_gradient=leaf.requires_grad)

    torch.manual_seed(0)
    return [output(path, leaf) for path, leaf in _leaves(call_model(model, example), "output")]


def check_numbers(model: nn.Module, wanted: list[Output]) -> None:
    """Raises ValueError unless there is a tensor, and no NaN."""
    tensors = [(path, leaf) for path, leaf, _ in wanted if isinstance(leaf, Tensor)]
    if not tensors:
        raise ValueError(f"this {type(model).__name__} returns no tensor on the example, so nothing can be compared")
    for path, leaf in tensors:
        if leaf.is_floating_point() and leaf.isnan().any():
            raise ValueError(
                f"before anything is rewired, {path} of this {type(model).__name__} is NaN on the example: look at its "
                "weights and at the example"
            )


def relative_error(want: Tensor, have: Tensor) -> float:
    """The largest difference, as a share of the largest element of `want`."""
    if not want.numel() or torch.equal(want, have):
        return 0.0
    if not (want.is_floating_point() or want.is_complex()):
        return float("inf")
    infinite = want.isinf()
    if not torch.equal(have[infinite], want[infinite]):
        return float("inf")
    want, have = (one.masked_fill(infinite, 0) for one in (want, have))
    return float((want - have).abs().max() / want.abs().max().clamp_min(1e-30))


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Everything in an output, with where it is: of mappings, sequences, dataclasses and objects that hold tensors."""
    if isinstance(value, Tensor) or value is None or isinstance(value, bool | int | float | complex | str | bytes):
        yield path, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}")
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            yield from _leaves(inner, f"{path}[{number}]")
    elif is_dataclass(value):
        for one in fields(value):
            yield from _leaves(getattr(value, one.name), f"{path}.{one.name}")
    elif hasattr(value, "__dict__") and not isinstance(value, nn.Module | type) and not callable(value):
        yield from _leaves(vars(value), path)
