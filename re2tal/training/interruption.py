"""Where all ranks agree to stop: signals reach them at different times, and some would save while others train."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from re2tal.distributed import any_rank
from re2tal.structures import Batch
from re2tal.training.signals import StopRequests
from re2tal.training.watchdog import at


class Interrupted(Exception):
    """All ranks were told to stop, and what they were at is left; it is done again when the run is resumed."""


class StopVote:
    """Asks all ranks whether one of them was told to stop."""

    def __init__(self, requests: StopRequests, device: torch.device) -> None:
        """`device`: where the group communicates."""
        self.requests = requests
        self.device = device

    def told(self) -> bool:
        """Every rank calls this, at the same place; True on all of them or on none."""
        return any_rank(bool(self.requests), device=self.device)

    def check(self) -> None:
        """Every rank calls this, at the same place. Interrupted on all of them when one was told to stop."""
        if self.told():
            raise Interrupted

    def between(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """`batches`, equally many on every rank, with a `check` before each."""
        at("an evaluation's first batch", patient=True)
        for number, batch in enumerate(batches):
            self.check()
            # The first one also waits for workers to start, or for a kernel to be chosen.
            at(f"an evaluation's batch {number}", patient=number == 0)
            yield batch
        at("an evaluation's scores", patient=True)
