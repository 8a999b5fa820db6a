"""Rewires a network in place, and puts it back.

    report = rewire(model)       # every container that holds residual blocks becomes a RewiredStage
    print(report)                # what was rewired, what was left alone and why
    unrewire(model)              # the network as it was

Names in the state dict and the parameters themselves stay the same, so checkpoints, optimizers and `from_pretrained`
work before and after alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from re2tal.rewire.branches import NotResidual, Residual, is_unregistered, registered
from re2tal.rewire.discover import record_calls, take_apart
from re2tal.rewire.stage import RewiredStage, RewiringConfig


@dataclass(frozen=True, slots=True)
class StageReport:
    """What became of one container of blocks."""

    name: str
    blocks: int
    rewired_blocks: int
    branches: tuple[str, ...]
    """Of one block each, such as "attention + mlp"; every kind once."""
    left_alone: tuple[str, ...]
    """One reason for each block, or group of blocks, that was not rewired."""


@dataclass(frozen=True, slots=True)
class RewireReport:
    """What `rewire` did to each container of blocks; prints as a table."""

    stages: tuple[StageReport, ...]

    def __str__(self) -> str:
        head = ("stage", "blocks", "rewired", "branches of a block", "left alone, because")
        rows = [
            (
                stage.name,
                str(stage.blocks),
                str(stage.rewired_blocks),
                ", ".join(stage.branches) or "-",
                "; ".join(stage.left_alone) or "-",
            )
            for stage in self.stages
        ]
        widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in (head, *rows)
        )


class _Place(NamedTuple):
    """Where a container hangs."""

    parent: nn.Module
    name: str
    path: str
    container: nn.Sequential | nn.ModuleList


def rewire(
    model: nn.Module, *, config: RewiringConfig | None = None, example: Sequence[Any] | None = None
) -> RewireReport:
    """Rewires every `nn.Sequential` and `nn.ModuleList` inside `model` that holds residual blocks.

    A parent that walks along an `nn.ModuleList` must only hand the hidden state on from block to block: one that takes
    states out on the way meets the stage as a single block.

    Args:
        model: changed in place.
        config: how blocks are coupled; by default as in the paper.
        example: inputs for `model`. With them it is run once, and blocks of a type that `residual_branches` does not
            know are taken apart by what they do (see `discover`); without them such blocks are left alone.

    Raises:
        ValueError: nothing in `model` could be rewired, it is rewired already, or it is itself a container of blocks.
    """
    if any(isinstance(module, RewiredStage) for module in model.modules()):
        raise ValueError(f"this {type(model).__name__} is rewired already; call unrewire(model) first")
    if isinstance(model, nn.Sequential | nn.ModuleList) and _has_residual_blocks(model):
        raise ValueError(f"this {type(model).__name__} is itself a container of blocks; rewire a module that holds it")
    places = list(_containers(model))
    analysis = _analyse(model, places, example)
    report = RewireReport(tuple(_report(place, analysis) for place in places))
    if not any(stage.rewired_blocks for stage in report.stages):
        raise ValueError(
            f"nothing in this {type(model).__name__} could be rewired; register residual_branches for its type of block"
            + (f":\n{report}" if places else ": it holds no nn.Sequential or nn.ModuleList of blocks")
        )
    stages: dict[nn.Module, RewiredStage] = {}  # a container may hang in several places
    for place, stage in zip(places, report.stages, strict=True):
        if stage.rewired_blocks:
            blocks = place.container.named_children()
            residual = {name: found for name, block in blocks if isinstance(found := analysis[block], Residual)}
            if place.container not in stages:
                stages[place.container] = RewiredStage(place.container, config or RewiringConfig(), residual=residual)
            setattr(place.parent, place.name, stages[place.container])
    return report


def unrewire(model: nn.Module) -> None:
    """Puts the containers back that `rewire` replaced; ValueError where there is none."""
    modules = list(model.named_modules(remove_duplicate=False))
    stages = [(path, module) for path, module in modules if isinstance(module, RewiredStage)]
    if not stages:
        raise ValueError(f"this {type(model).__name__} is not rewired")
    for path, stage in stages:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, stage.plain())


def _containers(parent: nn.Module, prefix: str = "") -> Iterator[_Place]:
    """The containers of residual blocks, and those of what looks like blocks but is not known to be residual."""
    for name, child in parent._modules.items():
        if child is None:
            continue
        path = f"{prefix}{name}"
        if isinstance(child, nn.Sequential | nn.ModuleList) and _has_residual_blocks(child):
            yield _Place(parent, name, path, child)
            continue
        inner = list(_containers(child, f"{path}."))
        if not inner and isinstance(child, nn.Sequential | nn.ModuleList) and _looks_like_blocks(child):
            inner = [_Place(parent, name, path, child)]
        yield from inner


def _has_residual_blocks(container: nn.Sequential | nn.ModuleList) -> bool:
    return any(isinstance(registered(child), Residual) for child in container)


def _looks_like_blocks(container: nn.Sequential | nn.ModuleList) -> bool:
    kinds = {type(child) for child in container if any(True for _ in child.children())}
    return len(container) > 1 and len(kinds) == 1


def _analyse(
    model: nn.Module, places: Sequence[_Place], example: Sequence[Any] | None
) -> dict[nn.Module, Residual | NotResidual]:
    """What every block is: by its registration, or by taking it apart where there is none and an example."""
    analysis = {block: registered(block) for place in places for block in place.container.children()}
    if example is not None:
        unknown = [block for block in analysis if is_unregistered(block)]
        calls = record_calls(model, unknown, example=example)
        missed = NotResidual("the example did not call it with a tensor as its first argument")
        analysis |= {block: take_apart(block, calls[block]) if block in calls else missed for block in unknown}
    return analysis


def _report(place: _Place, analysis: Mapping[nn.Module, Residual | NotResidual]) -> StageReport:
    blocks = dict(place.container.named_children())
    reason = _why_not_replaceable(place.container)
    if reason:
        return StageReport(place.path, len(blocks), 0, (), (reason,))
    kinds: dict[str, int] = {}
    reasons: dict[str, list[str]] = {}
    for name, block in blocks.items():
        match analysis[block]:
            case Residual(branches):
                kind = " + ".join(branch.name for branch in branches)
                kinds[kind] = kinds.get(kind, 0) + 1
            case NotResidual(reason):
                reasons.setdefault(reason, []).append(name)
    return StageReport(
        name=place.path,
        blocks=len(blocks),
        rewired_blocks=sum(kinds.values()),
        branches=tuple(kinds),
        left_alone=tuple(f"{', '.join(names)}: {reason}" for reason, names in reasons.items()),
    )


def _why_not_replaceable(container: nn.Module) -> str:
    """Why a container must stay, or "" where it does nothing but hold, or run, its children."""
    kind = nn.Sequential if isinstance(container, nn.Sequential) else nn.ModuleList
    if any(getattr(type(container), method) is not getattr(kind, method) for method in ("forward", "__iter__")):
        return f"{type(container).__name__} runs its blocks in a way of its own"
    if container._forward_hooks or container._forward_pre_hooks or container._backward_hooks:
        return f"this {type(container).__name__} has hooks, which would be lost: rewire first, then register them"
    return ""
