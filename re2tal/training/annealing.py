"""Beta at each step: from the network before rewiring to the coupling that training ends with.

    beta(s) = start + (end - start) min(s / annealing steps, 1)          s optimizer steps done

A pure function of the step, so that a resumed run goes on where it was. After Dr2Net (CVPR 2024), on the line alpha =
1 - beta; while beta is small the states of a run are kept, and memory is that of a checkpointed network.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from re2tal.options import NOT_NEGATIVE, SHARE, check_ranges, option


@dataclass(frozen=True)
class AnnealingConfig:
    """The way of a rewired backbone from its pretrained function to backbone.beta."""

    epochs: float = option(0.0, within=NOT_NEGATIVE)
    """Over how many epochs beta goes from `start` to backbone.beta, evenly; 0 trains with backbone.beta all along."""
    start: float = option(0.0, within=SHARE)
    """Beta of the first step; 0 is the network before rewiring."""

    def __post_init__(self) -> None:
        check_ranges(self, "annealing")


def beta_course(
    config: AnnealingConfig, *, end: float, steps_per_epoch: float, num_steps: int
) -> Callable[[int], float] | None:
    """Optimizer steps done (0 first) -> beta of the next one; None where it stays at `end`.

    ValueError where a run of `num_steps` ends before beta does.
    """
    if config.epochs == 0:
        return None
    # At least one: the course divides by it.
    annealing_steps = max(1, round(config.epochs * steps_per_epoch))
    if annealing_steps > num_steps:
        raise ValueError(
            f"annealing.epochs = {config.epochs} is {annealing_steps} steps, but the run has only {num_steps}; shorten "
            "it, or train for more epochs: a trained network is used with backbone.beta"
        )

    def course(step: int) -> float:
        if step >= annealing_steps:
            return end  # to the bit: the trained network is built with it
        return config.start + (end - config.start) * step / annealing_steps

    return course
