"""The same run on another number of ranks: as many clips per step, in the same order.

clips of a step = engine.batch_size x engine.gradient_accumulation x ranks         stays, and so does the batch size
batch a of rank r in a step takes the place a * ranks + r of the step's batches    whatever the number of ranks is
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from re2tal.training.config import EngineConfig
from re2tal.training.manifest import TrainingProgress

BATCH, ACCUMULATION, RANKS = "engine.batch_size", "engine.gradient_accumulation", "number of ranks"
"""Names of these values in the identity of a run."""


def same_clips_per_step(config: EngineConfig, saved: Mapping[str, Any], *, num_ranks: int) -> EngineConfig:
    """The configuration whose steps on `num_ranks` take as many clips as those of the `saved` run.

    ValueError, with the numbers of ranks that fit, where there is none.
    """
    batches = batches_of_step(saved)
    asked = config.gradient_accumulation
    # What the run began with divides its batches, on whatever number of ranks it was saved since: a job that is queued
    # again asks for it each time.
    if saved.get(BATCH) != config.batch_size or asked * num_ranks == batches or batches % asked:
        return config  # nothing to adapt, or another run: that is refused when the checkpoint is loaded
    if batches % num_ranks:
        # Every rank takes whole batches, so only divisors keep the clips of a step.
        fitting = [number for number in range(1, batches + 1) if batches % number == 0]
        raise ValueError(
            f"a step of this run takes {batches} batches of {config.batch_size} clips, which {num_ranks} ranks cannot "
            f"share evenly; resume on {', '.join(map(str, fitting))} ranks"
        )
    return replace(config, gradient_accumulation=batches // num_ranks)


def batches_of_step(run: Mapping[str, Any]) -> int:
    """Batches of all ranks together in an optimizer step of a run, by its identity."""
    return int(run.get(ACCUMULATION, 1)) * int(run.get(RANKS, 1))


def place_in_run(progress: TrainingProgress, saved: Mapping[str, Any], *, num_ranks: int) -> TrainingProgress:
    """The same place in the run for `num_ranks`: progress counts the batches of each rank.

    After batches that were skipped, a number that does not come out even is rounded up: up to a batch per rank is left
    out.
    """
    drawn = progress.micro_batches * int(saved.get(RANKS, num_ranks))
    return replace(progress, micro_batches=-(-drawn // num_ranks))
