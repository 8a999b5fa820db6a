"""Forward and losses of one batch. Nothing here waits for the device.

No rank asks the others before backward whether their loss is finite. DeepSpeed skips a step on all ranks when a
gradient of one is not, and here a loss that is not finite gets such gradients, whatever its own would be.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from re2tal.structures import Batch
from re2tal.training.deepspeed_import import Engine


@dataclass(frozen=True)
class MicroBatch:
    """The losses of one batch."""

    video_ids: tuple[str, ...]
    total: Tensor
    """The loss, with its graph."""
    losses: dict[str, Tensor]
    """By name, float32 scalars without a graph, on the device."""
    lost: Tensor
    """Whether the total is not finite: a bool scalar on the device."""

    def detached(self) -> MicroBatch:
        """The same without the graph, after backward."""
        return MicroBatch(self.video_ids, self.total.detach(), self.losses, self.lost)


def forward(engine: Engine, batch: Batch, frames: Tensor) -> MicroBatch:
    """Losses of a `batch` on the device; `frames` are what the network takes of it."""
    outputs = engine(frames, batch.mask)

    def readable(tensor: Tensor) -> Tensor:
        if tensor.dtype == torch.bool:
            # Clips that could not be decoded give no loss, but this rank still runs backward: the others wait.
            return tensor & batch.valid.view(-1, *[1] * (tensor.ndim - 1))
        # Losses sum over thousands of steps, which loses digits in half precision.
        return tensor.float() if tensor.is_floating_point() else tensor

    outputs = tree_map(readable, outputs)
    losses = engine.module.loss(outputs, batch.actions, batch.timelines, num_frames=batch.mask.shape[1])
    lost = ~torch.isfinite(losses["total"].detach())
    for output in tree_leaves(outputs):
        # A loss that is not finite may have finite gradients. NaN in those of one rank makes all ranks skip the step.
        if output.requires_grad:
            output.register_hook(lambda gradient: torch.where(lost, torch.nan, gradient))
    apart = {name: loss.detach().float() for name, loss in losses.items()}
    return MicroBatch(batch.video_ids, losses["total"], apart, lost)
