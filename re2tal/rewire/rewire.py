"""Rewires a network in place, and puts it back.

    report = rewire(model)       # every container that holds residual blocks becomes a RewiredStage
    print(report)                # what was rewired, what was left alone and why
    unrewire(model)              # the network as it was

Names in the state dict and the parameters themselves stay the same, so checkpoints, optimizers and `from_pretrained`
work before and after alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from re2tal.rewire.branches import NotResidual, Residual, is_explained, is_unregistered, registered, why_not_residual
from re2tal.rewire.conditions import tensors_restored
from re2tal.rewire.config import RewiringConfig
from re2tal.rewire.containers import own_names
from re2tal.rewire.cuts import Cut
from re2tal.rewire.discover import Example, as_a_whole, record_calls, take_apart
from re2tal.rewire.nonresidual import CheckpointedModule
from re2tal.rewire.report import RewireReport, StageReport
from re2tal.rewire.same_network import check_same_network
from re2tal.rewire.stage import RewiredStage


def rewire(
    model: nn.Module, *, config: RewiringConfig | None = None, example: Tensor | Example | None = None
) -> RewireReport:
    """Rewires every `nn.Sequential` and `nn.ModuleList` inside `model` that holds residual blocks.

    Args:
        model: changed in place.
        config: how blocks are coupled; by default as in the paper.
        example: small inputs for `model`: a tensor, a sequence, or arguments by name. With them blocks of a type that
            `residual_branches` does not know are taken apart by what they do (see `discover`), runs end where states
            are used in between, and the rewired model must return at beta 0 what the plain one does (see
            `same_network`). Without them such blocks are left alone, and a state that is used in between is an error
            in the first forward.

    Raises:
        RewireError: the rewired model would be another network. It is left as it was.
        ValueError: nothing in `model` could be rewired, it is rewired already, it is itself a container of blocks, or
            the example does not run, or has no numbers (the meta device).
    """
    if any(isinstance(module, RewiredStage) for module in model.modules()):
        raise ValueError(f"this {type(model).__name__} is rewired already; call unrewire(model) first")
    if torch.is_inference_mode_enabled():
        raise ValueError("rewire compares gradients, and was called inside torch.inference_mode(); call it outside")
    if isinstance(example, Tensor):
        example = (example,)  # a tensor is a sequence too: of its rows
    if example is not None:
        _refuse_without_numbers(model, example)
    # Blocks are looked at with the tensors that the example leaves behind: masks that a parent sets on them.
    with nullcontext() if example is None else tensors_restored(model):
        stages, report = _replace_containers(model, config, example)
    if example is not None:
        try:
            check_same_network(model, example)
        except ValueError:
            unrewire(model)
            raise
    _set_checkpointing(model, config is None or config.recompute)
    ends = tuple(stage.name_of(name) for stage in stages for name in stage.names() if name in stage.ends)
    return replace(report, outside=tuple(_left_outside(model, report)), ends=ends)


def _refuse_without_numbers(model: nn.Module, example: Example) -> None:
    given = [leaf for leaf in tree_leaves(example) if isinstance(leaf, Tensor)]
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers(), *given)):
        raise ValueError(
            f"with an example rewire compares numbers, and this {type(model).__name__}, or its example, lies on the "
            "meta device, which has none; put both on another device (model.to_empty(device='cpu'), then its weights), "
            "or rewire without an example"
        )


def _replace_containers(
    model: nn.Module, config: RewiringConfig | None, example: Example | None
) -> tuple[list[RewiredStage], RewireReport]:
    analyse = _analyst(model, example, whole_blocks=config is not None and config.unit == "block")
    if isinstance(model, nn.Sequential | nn.ModuleList) and _has_residual_blocks(model, analyse):
        raise ValueError(f"this {type(model).__name__} is itself a container of blocks; rewire a module that holds it")
    places = list(_places(model, analyse))
    report = RewireReport(tuple(_report(place, analyse) for place in places))
    if not any(stage.rewired_blocks for stage in report.stages):
        raise ValueError(
            f"nothing in this {type(model).__name__} could be rewired; register residual_branches for its type of block"
            + (f":\n{report}" if places else ": it holds no nn.Sequential or nn.ModuleList of blocks")
        )
    if config and config.chunk_mebibytes is not None and not any(_cuts(places, analyse)):
        raise ValueError(
            f"chunk_mebibytes is {config.chunk_mebibytes}, but no branch of this {type(model).__name__} says how it "
            "may be cut; leave it out, or give its branches a cut where they are registered"
        )
    stages: dict[nn.Module, RewiredStage] = {}  # a container may hang in several places
    for place, stage in zip(places, report.stages, strict=True):
        if stage.rewired_blocks:
            blocks = _blocks(place.container)
            residual = {name: found for name, block in blocks.items() if isinstance(found := analyse(block), Residual)}
            if place.container not in stages:
                stages[place.container] = RewiredStage(
                    place.container, config or RewiringConfig(), residual=residual, path=stage.name
                )
            setattr(place.parent, place.name, stages[place.container])
    return list(stages.values()), report


def _blocks(container: nn.Module) -> dict[str, nn.Module]:
    """By name; a block that hangs there twice has two."""
    return {name: block for name, block in container._modules.items() if block is not None}


def _left_outside(model: nn.Module, report: RewireReport) -> Iterator[str]:
    """The largest modules with parameters that hold no stage, nor anything that `report` tells of already."""
    reasons: dict[str, list[str]] = {}
    for path, module in _without_stages(model):
        if not any(stage.name == path or stage.name.startswith(f"{path}.") for stage in report.stages):
            reason = why_not_residual(module) if is_explained(module) else "no residual blocks"
            reasons.setdefault(reason, []).append(path)
    yield from (f"{', '.join(paths)}: {reason}" for reason, paths in reasons.items())


def _without_stages(parent: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    for name, child in parent.named_children():
        if isinstance(child, RewiredStage):
            continue
        if any(isinstance(module, RewiredStage) for module in child.modules()):
            yield from _without_stages(child, f"{prefix}{name}.")
        elif any(True for _ in child.parameters()):
            yield f"{prefix}{name}", child


def _set_checkpointing(model: nn.Module, checkpointing: bool) -> None:
    for module in model.modules():
        if isinstance(module, CheckpointedModule):
            module.checkpointing = checkpointing


def _cuts(places: Sequence[_Place], analyse: Analyst) -> Iterator[Cut | None]:
    """Of every branch that is rewired."""
    for place in places:
        for block in place.container.children():
            if isinstance(found := analyse(block), Residual):
                yield from (branch.cut for branch in found.branches)


def unrewire(model: nn.Module) -> None:
    """Puts the containers back that `rewire` replaced; ValueError where there is none."""
    modules = list(model.named_modules(remove_duplicate=False))
    stages = [(path, module) for path, module in modules if isinstance(module, RewiredStage)]
    if not stages:
        raise ValueError(f"this {type(model).__name__} is not rewired")
    for path, stage in stages:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, stage.plain())
    _set_checkpointing(model, False)


Analyst = Callable[[nn.Module], Residual | NotResidual]


def _analyst(model: nn.Module, example: Example | None, *, whole_blocks: bool) -> Analyst:
    """Says what a block is: by its registration, or by taking it apart where there is none and an example.

    With an example, and `whole_blocks`, it may be one that adds something, but not to its input alone.
    """
    containers = [module for module in model.modules() if isinstance(module, nn.Sequential | nn.ModuleList)]
    blocks = {block for container in containers for block in container.children() if _has_children(block)}
    unknown = {block for block in blocks if isinstance(registered(block), NotResidual)}
    calls = record_calls(model, unknown, example=example) if example is not None and unknown else {}

    def in_branches(block: nn.Module) -> Residual | NotResidual:
        if example is None or block not in unknown or not is_unregistered(block):
            return registered(block)
        if block in calls:
            return take_apart(block, calls[block])
        return NotResidual("the example did not call it with a tensor as its first argument")

    @cache
    def analyse(block: nn.Module) -> Residual | NotResidual:
        if "forward" in vars(block):
            return NotResidual("its forward was replaced on the instance, which no registration describes")
        found = in_branches(block)
        if isinstance(found, Residual) or block not in calls:
            return found
        inside = [module for module in block.modules() if isinstance(module, nn.Sequential | nn.ModuleList)]
        if any(_may_be_rewired(inner, analyse) for container in inside for inner in container.children()):
            return found
        whole = as_a_whole(block, calls[block])
        if isinstance(whole, Residual) and not whole_blocks:
            reason = f"{found.reason}; as a whole, RewiringConfig(unit='block'), it can be rewired"
            return NotResidual(reason, as_a_whole=True)
        return whole if whole is not None and whole_blocks else found

    return analyse


class _Place(NamedTuple):
    """Where a container hangs."""

    parent: nn.Module
    name: str
    path: str
    container: nn.Module


def _places(parent: nn.Module, analyse: Analyst, prefix: str = "") -> Iterator[_Place]:
    """The outermost containers of residual blocks, and the innermost of other modules that are not single layers."""
    for name, child in parent._modules.items():
        if child is None:
            continue
        path = f"{prefix}{name}"
        is_container = isinstance(child, nn.Sequential | nn.ModuleList)
        if is_container and _has_residual_blocks(child, analyse):
            yield _Place(parent, name, path, child)
            continue
        inner = list(_places(child, analyse, f"{path}."))
        # One of blocks that stay as they are is told of too, with the reason, unless a container inside is rewired.
        if is_container and not any(_has_residual_blocks(place.container, analyse) for place in inner):
            blocks = list(child.children())
            if any(_may_be_rewired(block, analyse) for block in blocks) or (
                not inner and any(map(_has_children, blocks))
            ):
                yield _Place(parent, name, path, child)
                continue
        yield from inner


def _has_residual_blocks(container: nn.Module, analyse: Analyst) -> bool:
    return any(isinstance(analyse(block), Residual) for block in container.children())


def _may_be_rewired(block: nn.Module, analyse: Analyst) -> bool:
    """In branches, or else with `unit` "block"."""
    found = analyse(block)
    return isinstance(found, Residual) or found.as_a_whole


def _has_children(module: nn.Module) -> bool:
    return any(True for _ in module.children())


def _report(place: _Place, analyse: Analyst) -> StageReport:
    blocks = _blocks(place.container)
    reason = _why_not_replaceable(place.container)
    if reason:
        return StageReport(place.path, len(blocks), 0, (), (reason,))
    kinds: dict[str, int] = {}
    reasons: dict[str, list[str]] = {}
    for name, block in blocks.items():
        match analyse(block):
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
    held = {"config", "path", "residual", "kinks", "monitor", "ends", "recorder"}
    if hidden := sorted(own_names(container) & (held | set(dir(RewiredStage)))):
        return f"this {type(container).__name__} has a {hidden[0]} of its own, as a rewired stage has"
    if container._forward_hooks or container._forward_pre_hooks or container._backward_hooks:
        return f"this {type(container).__name__} has hooks, which would be lost: rewire first, then register them"
    return ""
