"""The learning rate as a factor of its peak, per optimizer step: a linear rise, then a cosine fall or a plateau."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class WarmupCosine:
    """A linear rise to the peak, then half a cosine down to `final_factor` of it at the end of the run."""

    warmup_epochs: float = 5.0
    """Length of the rise; 0 starts at the peak."""
    final_factor: float = 0.0
    """Learning rate at the end, as a share of the peak."""

    def __post_init__(self) -> None:
        _check_warmup(self.warmup_epochs)
        if not 0 <= self.final_factor <= 1:
            raise ValueError(f"schedule.final_factor is {self.final_factor}; it is a share of the peak, from 0 to 1")


@dataclass(frozen=True)
class WarmupConstant:
    """A linear rise to the peak, which then holds."""

    warmup_epochs: float = 5.0
    """Length of the rise; 0 starts at the peak."""

    def __post_init__(self) -> None:
        _check_warmup(self.warmup_epochs)


ScheduleConfig = WarmupCosine | WarmupConstant


def learning_rate_factor(config: ScheduleConfig, *, steps_per_epoch: float, num_steps: int) -> Callable[[int], float]:
    """Optimizer step (0 first) -> factor of the peak learning rate. `num_steps` is the length of the whole run.

    The first step already learns: step s of a rise of w steps has (s + 1) / w.
    """
    warmup_steps = round(config.warmup_epochs * steps_per_epoch)
    if warmup_steps > num_steps:
        raise ValueError(
            f"schedule.warmup_epochs = {config.warmup_epochs} is {warmup_steps} steps, but the run has only {num_steps}; "
            "shorten the warmup, or train for more epochs"
        )

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        match config:
            case WarmupConstant():
                return 1.0
            case WarmupCosine(final_factor=final):
                progress = min((step - warmup_steps) / max(num_steps - warmup_steps, 1), 1.0)
                return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * progress))

    return factor


def _check_warmup(epochs: float) -> None:
    if not epochs >= 0:
        raise ValueError(f"schedule.warmup_epochs is {epochs}; it must not be negative")
