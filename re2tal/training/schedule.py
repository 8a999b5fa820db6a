"""The learning rate as a factor of its peak, per optimizer step: a linear rise, then a cosine fall or a plateau."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch.optim.lr_scheduler import LambdaLR

from re2tal.options import NOT_NEGATIVE, SHARE, check_ranges, option


@dataclass(frozen=True)
class ScheduleConfig:
    """A linear rise to the peak learning rate, and what follows."""

    shape: Literal["cosine", "constant"] = option("cosine", resumable=True)
    """After the rise: half a cosine down to the end of the run, or the peak all the way."""
    warmup_epochs: float = option(5.0, within=NOT_NEGATIVE, resumable=True)
    """Length of the rise; 0 starts at the peak."""
    final_factor: float = option(0.0, within=SHARE, resumable=True)
    """Where the cosine ends, as a share of the peak."""

    def __post_init__(self) -> None:
        check_ranges(self, "schedule")


def learning_rate_factor(config: ScheduleConfig, *, steps_per_epoch: float, num_steps: int) -> Callable[[int], float]:
    """Optimizer step (0 first) -> factor of the peak learning rate. `num_steps` is the length of the whole run.

    The first step already learns: step s of a rise of w steps has (s + 1) / w.
    """
    # Steps of an epoch need not be whole where accumulation does not divide it.
    warmup_steps = round(config.warmup_epochs * steps_per_epoch)
    if warmup_steps > num_steps:
        raise ValueError(
            f"schedule.warmup_epochs = {config.warmup_epochs} is {warmup_steps} steps, but the run has only "
            f"{num_steps}; shorten the warmup, or train for more epochs"
        )

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        if config.shape == "constant":
            return 1.0
        progress = min((step - warmup_steps) / max(num_steps - warmup_steps, 1), 1.0)
        return config.final_factor + (1.0 - config.final_factor) * 0.5 * (1.0 + math.cos(math.pi * progress))

    return factor


@dataclass(frozen=True, slots=True)
class PeakRates:
    """The peak learning rate of each group, taken before a checkpoint puts the earlier run's in their place."""

    rates: tuple[float, ...]

    @classmethod
    def of(cls, scheduler: LambdaLR) -> PeakRates:
        """Those that `scheduler` has now."""
        return cls(tuple(float(rate) for rate in scheduler.base_lrs))

    def apply(self, scheduler: LambdaLR, *, step: int) -> tuple[float, float]:
        """Goes on by the scheduler's own factor after `step` steps. Returns the largest learning rate of the next step
        before and after; they are equal to the bit where neither factor nor peaks have changed.
        """
        groups = scheduler.optimizer.param_groups
        before = max(group["lr"] for group in groups)
        # Checkpoints of earlier versions stand behind by the steps that were skipped.
        scheduler.last_epoch = step
        scheduler.base_lrs = list(self.rates)
        for group, factor, rate in zip(groups, scheduler.lr_lambdas, self.rates, strict=True):
            # `initial_lr` too: LambdaLR multiplies that by the factor from here on.
            group["initial_lr"], group["lr"] = rate, rate * factor(scheduler.last_epoch)
        scheduler._last_lr = [group["lr"] for group in groups]
        return before, max(group["lr"] for group in groups)


def num_optimizer_steps(epochs: int, steps_per_epoch: int, *, accumulation: int) -> int:
    """Optimizer steps of the whole run. Raises ValueError when the data is too short for a single one."""
    steps = epochs * steps_per_epoch // accumulation
    if steps == 0:
        raise ValueError(
            f"{epochs} epochs of {steps_per_epoch} batches give no step with gradient accumulation "
            f"{accumulation}; add videos, train for more epochs, or use a smaller batch or fewer ranks"
        )
    return steps
