"""Counts the bytes that a backbone keeps from forward to backward, without running it.

The forward runs on fake tensors, which have shapes and no numbers, so that a network of any size is counted in seconds.
The count is of what autograd saves on the device, each storage once: two states of a reversible run (of a run of one
branch, its input) unless they are offloaded. Parameters, buffers, and what a branch needs while it is differentiated
are left out.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call

from re2tal.backbones.base import VideoBackbone
from re2tal.reversible.recompute import saved_tensors_seen_by


def kept_bytes(backbone: VideoBackbone, *, num_frames: int, size: tuple[int, int]) -> int:
    """For one clip of `num_frames` frames of `size` (rows, columns), float32, on the device of the backbone."""
    return kept_bytes_of(
        backbone, lambda: (torch.zeros(1, 3, num_frames, *size), torch.ones(1, num_frames, dtype=torch.bool))
    )


def kept_bytes_of(model: nn.Module, inputs: Callable[[], tuple[Tensor, ...]]) -> int:
    """The same for any model; `inputs` makes its arguments."""
    # A network may hold constants that are neither parameters nor buffers.
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    fakes: dict[str, Tensor] = {name: mode.from_tensor(value) for name, value in state.items()}
    # Weights that autograd saves take no memory of their own.
    constant = {_storage(fake) for fake in fakes.values()}
    saved: dict[int, Tensor] = {}  # kept, so that no storage gets the address of one that is gone

    def see(tensor: Tensor) -> None:
        if _storage(tensor) not in constant:
            saved[_storage(tensor)] = tensor

    with mode, saved_tensors_seen_by(see):
        functional_call(model, fakes, inputs())
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


def _storage(tensor: Tensor) -> int:
    # Not the address of its data, which fake tensors do not have.
    return tensor.untyped_storage()._cdata
