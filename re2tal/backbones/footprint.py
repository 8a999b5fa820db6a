"""What a backbone keeps from forward to backward, plain and rewired: counted, not run.

    plain      every tensor that autograd saves
    rewired    those that it saves outside reversible runs + what each run keeps, unless that is offloaded: two states,
               the input of a run of one, more where the coupling is not the paper's

The forward runs on fake tensors, which have shapes and no numbers, so that any size of network is counted in seconds.
Parameters and buffers are not counted, nor what a branch needs while it is differentiated.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call

from re2tal.backbones.base import VideoBackbone
from re2tal.rewire import RewiredStage, unrewire


def kept_bytes(backbone: VideoBackbone, *, num_frames: int, size: tuple[int, int]) -> int:
    """For one clip of `num_frames` frames of `size` (rows, columns), float32. Leaves a rewired backbone plain."""
    ledger = _Ledger()
    stages = [module for module in backbone.modules() if isinstance(module, RewiredStage)]
    sequences = [sequence for stage in stages for sequence in _sequences(stage)]
    if stages:
        unrewire(backbone)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    state = {**dict(backbone.named_parameters()), **dict(backbone.named_buffers())}
    fakes: dict[str, Tensor] = {name: mode.from_tensor(value) for name, value in state.items()}
    ledger.ignored = {_storage(fake) for fake in fakes.values()}
    with ExitStack() as stack:
        for blocks, runs in sequences:
            for index, block in enumerate(blocks):
                for handle in ledger.watch(block, runs=runs if index == 0 else []):
                    stack.callback(handle.remove)
        stack.enter_context(mode)
        stack.enter_context(saved_tensors_hooks(ledger.save, lambda tensor: tensor))
        frames = torch.zeros(1, 3, num_frames, *size)
        functional_call(backbone, fakes, (frames, torch.ones(1, num_frames, dtype=torch.bool)))
    return ledger.states + sum(ledger.saved.values())


def _sequences(stage: RewiredStage) -> Iterator[tuple[list[nn.Module], list[list[int]]]]:
    """The blocks of each unbroken residual sequence, and which of its states each run keeps here."""
    for blocks, lengths in stage.runs():
        kept = [stage.kept(length, dtype=torch.float32) for length in lengths]
        yield blocks, [] if stage.config.offload else kept


class _Ledger:
    """What autograd saves outside the watched blocks, each storage once, and the states of the runs they stand for."""

    def __init__(self) -> None:
        self.saved: dict[int, int] = {}
        self.states = 0
        self.ignored: set[int] = set()
        self._depth = 0
        self._alive: list[Tensor] = []  # so that no storage gets the address of one that is gone

    def watch(self, block: nn.Module, *, runs: list[list[int]]) -> tuple:
        """Ignore what `block` saves; count the states of the runs that begin at it."""

        def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
            state_bytes = args[0].untyped_storage().nbytes()
            for number, kept in enumerate(runs):
                if number == 0 and 0 in kept:  # the input itself, which others may keep too
                    self.save(args[0])
                self.states += (len(kept) - (number == 0 and 0 in kept)) * state_bytes
            self._depth += 1

        def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._depth -= 1

        return block.register_forward_pre_hook(enter), block.register_forward_hook(leave)

    def save(self, tensor: Tensor) -> Tensor:
        """Autograd's hook: notes the storage, returns the tensor."""
        if not self._depth and _storage(tensor) not in self.ignored:
            self._alive.append(tensor)
            self.saved[_storage(tensor)] = tensor.untyped_storage().nbytes()
        return tensor


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
