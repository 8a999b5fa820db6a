"""How much of its time a run spends on checkpoints: while one is written, no rank trains.

share  =  seconds of all saves / seconds since the first one ended
"""

from __future__ import annotations

import math

LARGEST_SHARE = 0.02
"""Of the time, what checkpoints may take before the run says so."""
SAVES = 3
"""So many are looked at before anything is said: the last one of a run, or of a stop, follows its predecessor early."""


class Stall:
    """Counts the saves of one process."""

    def __init__(self) -> None:
        self._saves = 0
        self._first_step = 0
        self._since = self._spent = 0.0

    def add(self, step: int, *, started: float, ended: float) -> str | None:
        """One save, after optimizer step `step`, in seconds of one clock; after a few, advice in words if it is due."""
        self._saves += 1
        if self._saves == 1:
            self._first_step, self._since = step, ended
            return None
        self._spent += ended - started
        elapsed = ended - self._since
        share = self._spent / max(elapsed, 1e-9)
        # Said once, and only where steps were trained in between.
        if self._saves != SAVES + 1 or share <= LARGEST_SHARE or step == self._first_step:
            return None
        one = self._spent / SAVES
        step_seconds = (elapsed - self._spent) / (step - self._first_step)
        enough = math.ceil(one * (1 - LARGEST_SHARE) / (LARGEST_SHARE * max(step_seconds, 1e-9)))
        return (
            f"checkpoints take {share:.0%} of the time, {one:.2g} s each: with --training.checkpoint-every-steps "
            f"{enough} they would take {LARGEST_SHARE:.0%}"
        )
