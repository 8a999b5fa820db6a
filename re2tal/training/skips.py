"""Steps that are not applied: the reason, the videos at fault, and an error if too many come in a row.

Every rank calls all of it at the same places; what is said and raised is the same on all.
"""

from __future__ import annotations

from collections.abc import Sequence

from re2tal.distributed import any_rank
from re2tal.training.agreement import videos_by_rank
from re2tal.training.deepspeed_import import Engine
from re2tal.training.finite import GradientWatch
from re2tal.training.metrics import MetricsLog
from re2tal.training.micro_batch import MicroBatch

# From 2^16, DeepSpeed's first scale, 40 halvings lead to 2^-24, the smallest number of fp16.
LOSS_SCALE_SEARCH = 40
"""Steps in a row that fp16 may skip while its loss scale is sought, beyond `max_non_finite`."""


class Skips:
    """Counts, of one run, the steps in a row that were not applied."""

    def __init__(self, engine: Engine, log: MetricsLog, *, max_non_finite: int) -> None:
        self.engine = engine
        self.log = log
        self.max_non_finite = max_non_finite
        self.watch = GradientWatch(engine)
        self.non_finite_in_a_row = self.overflows_in_a_row = 0

    def applied(self) -> None:
        """A step was applied."""
        self.non_finite_in_a_row = self.overflows_in_a_row = 0

    def is_lost(self, micro_batches: Sequence[MicroBatch], *, step: int) -> bool:
        """After a step that was not applied: True if a rank's loss was not finite, False if only gradients were not.

        FloatingPointError when there were too many such steps in a row.
        """
        # `bool` waits for the device, so this is asked only after a step that was not applied.
        lost = [video for one in micro_batches if bool(one.lost) for video in one.video_ids]
        if any_rank(bool(lost), device=self.engine.device):
            self._non_finite(f"the loss is not finite: {videos_by_rank(lost)}")
            return True
        who = videos_by_rank(self.watch.culprits())
        if self.engine.fp16_enabled():
            # Counted apart: DeepSpeed begins with a loss scale of 2^16 and halves it at every overflow, so a sound run
            # may skip a dozen steps in a row.
            self.overflows_in_a_row += 1
            in_a_row, limit = self.overflows_in_a_row, self.max_non_finite + LOSS_SCALE_SEARCH
            scale = float(self.engine.optimizer.loss_scale)
            reason = f"the gradients of step {step} overflow: {who}; the loss scale is {scale:g} now"
            self._skip(reason, in_a_row=in_a_row, limit=limit)
        else:
            self._non_finite(f"the gradients of step {step} are not finite: {who}")
        return False

    def _non_finite(self, reason: str) -> None:
        self.non_finite_in_a_row += 1
        self._skip(reason, in_a_row=self.non_finite_in_a_row, limit=self.max_non_finite)

    def _skip(self, reason: str, *, in_a_row: int, limit: int) -> None:
        self.log.say(f"skipped: {reason}")
        if in_a_row >= limit:
            raise FloatingPointError(
                f"{in_a_row} batches or steps in a row were not finite, the last because {reason}; "
                "the run has diverged: lower the learning rate, lengthen the warmup, or train in fp32. "
                "Checkpoints are intact"
            )
