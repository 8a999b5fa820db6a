"""A stage of a rewired network: the container of its blocks, which runs them reversibly.

    plain        x -> block 0 -> block 1 -> ... -> block n-1
    rewired      x -> downsampling block -> [reversible run over the branches of blocks 1 .. n-1] -> merge

It takes the place of an `nn.Sequential`, which is called, or of an `nn.ModuleList`, which a parent walks along:

    for layer in self.layers:            # iterating over a rewired stage gives the stage itself, once,
        x = layer(x, mask)               # so this line runs all of it
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import groupby
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

from re2tal.reversible import run_reversibly
from re2tal.reversible.chunking import ChunkedBranch, Piece, WholeBranch
from re2tal.reversible.coupling import Coupling
from re2tal.reversible.monitor import Monitor
from re2tal.reversible.offload import offloaded
from re2tal.reversible.precision import Precision
from re2tal.rewire.branches import Branch, Residual, is_unregistered
from re2tal.rewire.config import RewiringConfig
from re2tal.rewire.nonresidual import recomputed


class RewiredStage(nn.Module):
    """The blocks of one stage under their old names; each unbroken sequence of residual ones is run reversibly.

    Called as one block is: `stage(x, *args, **kwargs)`; every block, and every branch, gets the same further arguments.
    """

    def __init__(
        self, plain: nn.Module, config: RewiringConfig, *, residual: Mapping[str, Residual], name: str = ""
    ) -> None:
        """`residual` holds the residual blocks by name; other blocks run unchanged. `name` is for warnings."""
        super().__init__()
        self.config = config
        self.residual = dict(residual)
        self.kinks = any(found.kinks for found in residual.values())
        self.monitor = None if config.monitor_every is None else Monitor(name, every=config.monitor_every)
        self._plain = (plain,)  # in a tuple, so that it is not a submodule: its children are ours
        self.training = plain.training
        for name, block in plain.named_children():
            self.add_module(name, block)

    @property
    def coupling(self) -> Coupling:
        """From `config.beta`, with alpha = 1 - beta, so that states neither grow nor shrink."""
        return Coupling(1 - self.config.beta, self.config.beta)

    def runs(self) -> Iterator[tuple[list[nn.Module], list[int]]]:
        """The blocks of each unbroken residual sequence, and the number of units in each of its reversible runs."""
        for blocks, residual in self._groups():
            if residual:
                by_block = self.config.unit == "block"
                total = len(blocks) if by_block else sum(len(self.residual[name].branches) for name in blocks)
                length = self.config.segment or total
                yield list(blocks.values()), [min(length, total - first) for first in range(0, total, length)]

    def kept(self, length: int, *, dtype: torch.dtype) -> list[int]:
        """Which of its states 0 .. `length` a run of that many functions keeps, if it starts with one of `dtype`."""
        x, config = torch.empty(0, dtype=dtype), self.config
        precision = Precision.of(x, config.grid, states=config.states, kinks=self.kinks)
        rebuilt = length - self.config.stored
        return self.coupling.kept(rebuilt, room=precision.room) if self.config.recompute and rebuilt > 0 else []

    def can_forget_nonresidual(self) -> bool:
        """Whether `keep_nonresidual` changes anything here."""
        return any(_can_forget(block) for name, block in self.named_children() if name not in self.residual)

    def _groups(self) -> Iterator[tuple[dict[str, nn.Module], bool]]:
        """Consecutive blocks that are all residual, or all not, and which of the two."""
        for residual, group in groupby(self.named_children(), key=lambda child: child[0] in self.residual):
            yield dict(group), residual

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Runs all blocks on x. The result has the form in which the last block returns it."""
        if self.config.recompute and torch.is_grad_enabled():
            _refuse_gradients(args, kwargs)
            if self.monitor is not None:
                self.monitor.step()
        output: Any = x
        for blocks, residual in self._groups():
            if residual:
                x = self._run(blocks, _hidden(output), args, kwargs)
                # A run returns a bare tensor; whoever calls the stage expects what its last block would return.
                name, block = blocks.popitem()
                output = self.residual[name].wrap(block, x)
            else:
                forgets = self.config.recompute and not self.config.keep_nonresidual
                for block in blocks.values():
                    call = partial(recomputed, block, owner=block) if forgets and _can_forget(block) else block
                    output = call(_hidden(output), *args, **kwargs)
        return output

    def _run(self, blocks: Mapping[str, nn.Module], x: Tensor, args: tuple, kwargs: dict) -> Tensor:
        units = [unit for name, block in blocks.items() for unit in self._units(name, block, args, kwargs)]
        length = self.config.segment or len(units)
        for first in range(0, len(units), length):
            # One context per run: prefetching follows the order of runs.
            with offloaded(x) if self.config.offload else nullcontext():
                x = run_reversibly(
                    units[first : first + length],
                    x,
                    recompute=self.config.recompute,
                    stored=self.config.stored,
                    known=self.config.known,
                    merge=self.config.merge,
                    coupling=self.coupling,
                    states=self.config.states,
                    grid=self.config.grid,
                    kinks=self.kinks,
                    owner=self,
                    monitor=self.monitor,
                )
        return x

    def _units(self, name: str, block: nn.Module, args: tuple, kwargs: dict) -> list[WholeBranch | ChunkedBranch]:
        if self.config.unit == "block":
            return [WholeBranch(type(block).__name__, partial(_whole, block, args, kwargs))]
        return [self._unit(block, branch, args, kwargs) for branch in self.residual[name].branches]

    def _unit(self, block: nn.Module, branch: Branch, args: tuple, kwargs: dict) -> WholeBranch | ChunkedBranch:
        name, function = f"{type(block).__name__} {branch.name}", partial(_part, block, branch, args, kwargs)
        last = branch.last_in(block)
        if self.config.chunk_mebibytes is None or branch.cut is None:
            return WholeBranch(name, function, last)
        _refuse_batch_statistics(block, name)
        pieces = partial(_pieces, block, branch, args, kwargs, chunk_bytes=self.config.chunk_mebibytes * 2**20)
        return ChunkedBranch(name, function, pieces, same_draws=not branch.cut.samples, last=last)

    def plain(self) -> nn.Module:
        """The container that this stage stands for, with this stage's blocks in it."""
        (plain,) = self._plain
        plain.training = self.training
        for name, block in self.named_children():
            plain.add_module(name, block)
        return plain

    def __iter__(self) -> Iterator[RewiredStage]:
        yield self

    def __len__(self) -> int:
        return len(self._modules)

    def __getitem__(self, index: int | slice) -> RewiredStage:
        if isinstance(index, slice) and range(len(self))[index] == range(len(self)):
            return self
        raise TypeError(
            f"a rewired stage runs as a whole, so {index} of its {len(self)} blocks cannot be taken out to be called; "
            "iterate over the stage, or look at a block with stage.get_submodule(name)"
        )

    def extra_repr(self) -> str:
        """The configuration, for `print(model)`."""
        return f"{self.config}"


def _whole(block: nn.Module, args: tuple, kwargs: dict, x: Tensor) -> Tensor:
    return _hidden(block(x, *args, **kwargs)) - x


def _part(block: nn.Module, branch: Branch, args: tuple, kwargs: dict, x: Tensor) -> Tensor:
    if not branch.through_block:
        return branch.function(block, x, *args, **kwargs)
    # The block must be called as a module, so that ZeRO-3's hooks gather its own parameters. For this one call its
    # forward is the branch.
    usual = vars(block).get("forward")
    block.forward = partial(branch.function, block)
    try:
        return block(x, *args, **kwargs)
    finally:
        del block.forward
        if usual is not None:
            block.forward = usual


def _pieces(
    block: nn.Module, branch: Branch, args: tuple, kwargs: dict, state: Tensor, *, chunk_bytes: float
) -> list[Piece]:
    """Cuts `branch` into enough pieces for each to need about `chunk_bytes` while it is differentiated."""
    assert branch.cut is not None
    inner_bytes = branch.cut.inner_states(block, state.shape) * state.numel() * state.element_size()
    parts = branch.cut.parts(block, state.shape, ceil(inner_bytes / chunk_bytes))
    if branch.cut.samples and len(parts) > 1:
        _refuse_rows(args, kwargs, num_samples=len(state), name=f"{type(block).__name__} {branch.name}")
    branches = [replace(branch, function=part.function or branch.function) for part in parts]
    return [
        Piece(part.axis, part.spans, partial(_part, block, branch, args, kwargs))
        for part, branch in zip(parts, branches, strict=True)
    ]


def _can_forget(block: nn.Module) -> bool:
    # A block must compute the same when it runs twice. Only a registration says that it does.
    return not is_unregistered(block)


def _hidden(output: Any) -> Tensor:
    """The hidden state in what a block returns: all of it, or the first of a tuple."""
    return output[0] if isinstance(output, tuple) else output


def _refuse_gradients(args: tuple, kwargs: dict) -> None:
    if any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_leaves((args, kwargs))):
        raise ValueError(
            "a rewired stage was called with a further argument that wants a gradient, which a reversible run cannot "
            "give; compute it inside the block from the block's own parameters, detach it, or set recompute=False"
        )


def _refuse_batch_statistics(block: nn.Module, name: str) -> None:
    for module in block.modules():
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            raise ValueError(
                f"{name} cannot be run in pieces: its {type(module).__name__} takes its statistics over all of them; "
                "keep normalisation in evaluation mode (backbone.norm_eval), or leave chunk_mebibytes out"
            )


def _refuse_rows(args: tuple, kwargs: dict, *, num_samples: int, name: str) -> None:
    for leaf in tree_leaves((args, kwargs)):
        if isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == num_samples:
            raise ValueError(
                f"{name} cannot be run sample by sample: besides {num_samples} samples its block is called with a "
                f"tensor of shape {tuple(leaf.shape)}, whose rows may belong to them; leave chunk_mebibytes out"
            )
