"""An exponential moving average of the weights, kept in the shards the optimizer keeps.

    average <- decay * average + (1 - decay) * weights          after every optimizer step

The average lives beside each rank's float32 master weights, so under ZeRO it costs 1 / ranks of a model per rank and no
communication. Evaluation trades places: inside `in_place_of_weights` the model computes with the average.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from re2tal.training.deepspeed_import import Engine
from re2tal.training.engine_weights import master_weights, publish
from re2tal.training.interruption import Interrupted

LARGEST_SHARE, SMALL_SHARE = 0.1, 0.01
"""Of the last average, what the initial weights may be before the run says so, and what they are with its advice."""


def about_short_run(decay: float | None, *, num_steps: int) -> str | None:
    """What a run of so few steps averages, in a sentence; None where its end counts for nearly all."""
    if decay is None or (share := decay**num_steps) <= LARGEST_SHARE:
        return None
    return (
        f"training.average_decay is {decay:g}: after {num_steps} steps {share:.0%} of the averaged weights, which are "
        f"evaluated and exported, are still the initial ones; with {SMALL_SHARE ** (1 / num_steps):.3g} it would be "
        f"{SMALL_SHARE:.0%}, and None averages nothing"
    )


class WeightAverage:
    """The moving average of one engine's trainable weights. Buffers are not averaged: the model's own are used."""

    def __init__(self, engine: Engine, *, decay: float) -> None:
        self.engine = engine
        self.decay = decay
        self.shards = [shard.clone() for shard in master_weights(engine)]

    @torch.no_grad()
    def update(self) -> None:
        """To be called after every applied optimizer step."""
        # One kernel for all shards, where each alone would launch its own.
        torch._foreach_lerp_(self.shards, master_weights(self.engine), 1.0 - self.decay)

    @contextmanager
    def in_place_of_weights(self) -> Iterator[None]:
        """Every rank enters this: inside, the model computes with the average; afterwards with its weights again.

        But for an error, which ends the run: it may be of this rank alone, and to trade back takes all of them.
        """
        self._trade()
        try:
            yield
        except Interrupted:  # on all ranks
            self._trade()
            raise
        self._trade()

    @torch.no_grad()
    def _trade(self) -> None:
        for average, weights in zip(self.shards, master_weights(self.engine), strict=True):
            # Shard by shard, so that one of them at most is held a third time.
            held = weights.clone()
            weights.copy_(average)
            average.copy_(held)
        publish(self.engine)

    def state(self) -> list[Tensor]:
        """This rank's shards, for its checkpoint."""
        return [shard.cpu() for shard in self.shards]

    @torch.no_grad()
    def restore(self, shards: list[Tensor]) -> None:
        """Takes over shards that `state` gave in a run of the same shape."""
        shapes, expected = [shard.shape for shard in shards], [shard.shape for shard in self.shards]
        if shapes != expected:
            raise ValueError(
                f"the checkpoint's weight average has shards {shapes}, this run {expected}; resume with the same ranks"
            )
        for mine, saved in zip(self.shards, shards, strict=True):
            mine.copy_(saved)
