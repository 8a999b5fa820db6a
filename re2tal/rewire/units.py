"""The units of a reversible run: the branches of a block, or the whole block, with the arguments it was called with."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from math import ceil

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.utils._pytree import tree_leaves

from re2tal.reversible.chunking import ChunkedBranch, Piece, WholeBranch
from re2tal.rewire.branches import Branch, Residual, hidden_state
from re2tal.rewire.config import RewiringConfig
from re2tal.rewire.escapes import checked_for_escapes
from re2tal.rewire.hooks import called_with, forward_hooks_of, is_sharded
from re2tal.rewire.pending import BlockCall, RewireError

Unit = WholeBranch | ChunkedBranch


def units_of(block: nn.Module, residual: Residual, config: RewiringConfig, *, call: BlockCall, name: str) -> list[Unit]:
    """The units of `block`, called `name`, for the arguments that `call` noted.

    Raises RewireError for a unit of FSDP that would run branch by branch.
    """
    # A block that was born reversible changes one stream after the other, so it is no single branch.
    if config.unit == "block" and residual.streams is None:
        return [WholeBranch(type(block).__name__, partial(_whole, block, call, name))]
    if is_sharded(block):
        raise RewireError(
            f"block {name} is a unit of FSDP, which gathers and reduces its parameters once, but it is run branch by "
            "branch, and branches would lose gradients: give fully_shard the stage, the whole model, or modules "
            "inside of one branch, or rewire with unit 'block'"
        )
    return [_unit(block, branch, call, name, chunk_mebibytes=config.chunk_mebibytes) for branch in residual.branches]


def _unit(block: nn.Module, branch: Branch, call: BlockCall, path: str, *, chunk_mebibytes: float | None) -> Unit:
    name, function = f"{type(block).__name__} {branch.name}", partial(_part, block, branch, call, path)
    last = branch.last_in(block)
    if chunk_mebibytes is None or branch.cut is None:
        return WholeBranch(name, function, last)
    _refuse_batch_statistics(block, name)
    pieces = partial(_pieces, block, branch, call, path, chunk_bytes=chunk_mebibytes * 2**20)
    return ChunkedBranch(name, function, pieces, same_draws=not branch.cut.samples, last=last)


def unit_checked_for_escapes(unit: Unit, *, stage: str, repeated: nn.Module | None) -> Unit:
    """`unit`, whole or in pieces, which raises RewireError if it leaves anything behind; see `checked_for_escapes`."""
    check = partial(checked_for_escapes, name=f"a branch of rewired stage {stage} ({unit.name})", repeated=repeated)
    checked = replace(unit, function=check(unit.function))
    if isinstance(checked, WholeBranch):
        return checked
    cut = checked.cut
    return replace(
        checked,
        cut=lambda state: [replace(one, function=check(one.function)) for one in cut(state)],
    )


def _whole(block: nn.Module, call: BlockCall, path: str, x: Tensor) -> Tensor:
    call.check(path)
    # Not `block.forward`: while users' hooks on the last block of a run fire, that is the call of the whole run.
    forward, hidden = partial(type(block).forward, block), forward_hooks_of(block)
    output = called_with(block, forward, x, call.args, call.kwargs, hidden=hidden)
    # The coupling adds the skip, so the block's own is taken off. That costs one rounding.
    return hidden_state(output) - x


def _part(block: nn.Module, branch: Branch, call: BlockCall, path: str, x: Tensor) -> Tensor:
    call.check(path)
    if not branch.through_block:
        return branch.function(block, x, *call.args, **call.kwargs)
    # The block must be called as a module, so that ZeRO-3's hooks gather its own parameters. For this one call its
    # forward is the branch.
    function, hidden = partial(branch.function, block), forward_hooks_of(block)
    return called_with(block, function, x, call.args, call.kwargs, hidden=hidden)


def _pieces(
    block: nn.Module, branch: Branch, call: BlockCall, path: str, state: Tensor, *, chunk_bytes: float
) -> list[Piece]:
    """Cuts `branch` into enough pieces for each to need about `chunk_bytes` while it is differentiated."""
    assert branch.cut is not None
    inner_bytes = branch.cut.inner_states(block, state.shape) * state.numel() * state.element_size()
    parts = branch.cut.parts(block, state.shape, ceil(inner_bytes / chunk_bytes))
    if branch.cut.samples and len(parts) > 1:
        _refuse_rows(call, num_samples=len(state), name=f"{type(block).__name__} {branch.name}")
    branches = [replace(branch, function=part.function or branch.function) for part in parts]
    return [
        Piece(part.axis, part.spans, partial(_part, block, branch, call, path))
        for part, branch in zip(parts, branches, strict=True)
    ]


def joins_pieces(module: nn.Module) -> bool:
    """Whether it is a norm that takes statistics over all pieces of a state, or writes them once."""
    if isinstance(module, _BatchNorm):
        return module.training or module.running_mean is None
    return isinstance(module, _InstanceNorm) and module.training and module.track_running_stats


def _refuse_batch_statistics(block: nn.Module, name: str) -> None:
    for module in filter(joins_pieces, block.modules()):
        raise ValueError(
            f"{name} cannot be run in pieces: its {type(module).__name__} takes its statistics over all of them; "
            "keep normalisation in evaluation mode (backbone.norm_eval), or leave chunk_mebibytes out"
        )


def _refuse_rows(call: BlockCall, *, num_samples: int, name: str) -> None:
    for leaf in tree_leaves((call.args, call.kwargs)):
        if isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == num_samples:
            raise ValueError(
                f"{name} cannot be run sample by sample: besides {num_samples} samples its block is called with a "
                f"tensor of shape {tuple(leaf.shape)}, whose rows may belong to them; leave chunk_mebibytes out"
            )
