"""Names the ranks and videos of steps whose loss jumped: clipping bounds what such a step does, and hides it.

a loss has jumped  <=>  it is FACTOR times the mean of those before it, of the same rank
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite

import torch
from torch import Tensor

FACTOR = 10.0
DECAY = 0.98
"""Of the mean: about the last 50 losses count."""
LEAST = 10
"""So many losses make a mean; none of them is judged."""


class LossWatch:
    """The losses of one rank. Only the log shows what it finds: no step depends on it, and no checkpoint keeps it."""

    def __init__(self) -> None:
        self._seen: list[tuple[int, Tensor, tuple[str, ...]]] = []
        self._mean = 0.0
        self._count = 0

    def add(self, step: int, loss: Tensor, video_ids: Sequence[str]) -> None:
        """The loss of one batch, taken in optimizer step `step`: a scalar that stays on its device until `found`."""
        self._seen.append((step, loss.detach(), tuple(video_ids)))

    def found(self) -> list[str]:
        """What jumped since the last call, in words. Waits for the device once."""
        losses = torch.stack([loss.float() for _, loss, _ in self._seen]).tolist() if self._seen else []
        jumps = []
        for (step, _, videos), loss in zip(self._seen, losses, strict=True):
            if self._count >= LEAST and 0 < FACTOR * self._mean < loss:
                jumps.append(f"step {step}: {loss:.3g}, {loss / self._mean:.0f} times the mean, from {list(videos)}")
                loss = FACTOR * self._mean  # one jump must not hide the next
            if not isfinite(loss):  # its step is skipped, or ends the run; in the mean it would hide all that follow
                continue
            self._count += 1
            # A plain mean until it has 50 losses, so that the first one does not weigh more than the others.
            self._mean += (loss - self._mean) * max(1 - DECAY, 1 / self._count)
        self._seen = []
        return jumps
