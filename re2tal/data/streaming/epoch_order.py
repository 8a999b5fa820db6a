"""The order of an epoch, known before a byte is read: which clips make the batch of each step on each rank.

    order   shards shuffled, their videos in a row, each moved a little     (training; evaluation keeps index order)
    step b  takes units [b G, (b + 1) G) of the order, G = world_size * batch_size
    rank r  takes the r-th `batch_size` of these

Pure: the same arguments give the same plan on every rank, so that all ranks make the same number of steps without a
word between them (one rank short of a batch would hang the others' collectives). A plan is entered at any step. Steps
hold the same units for any number of readers, and for any split of G over ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

# Half a megabyte of numbers.
_DRAWN_AT_ONCE = 1 << 16


@dataclass(frozen=True, slots=True)
class Unit:
    """One clip of an epoch."""

    video: int
    """position in the index"""
    window: int
    """which of the video's windows; 0 in training, where the window is drawn"""
    valid: bool = True
    """False for what only fills the last batch"""


def count_steps(num_units: int, *, batch_size: int, world_size: int, training: bool) -> int:
    """Steps of an epoch: whole batches in training, every unit in evaluation.

    Raises:
        ValueError: if there is nothing to read, or in training not enough for one step of all ranks.
    """
    if min(batch_size, world_size) < 1:
        raise ValueError(f"batch_size is {batch_size} and world_size {world_size}; both must be 1 or more")
    per_step = world_size * batch_size
    if num_units == 0:
        raise ValueError("the split is empty: no videos to read; build shards of another subset")
    # Evaluation fills its last step with clips that are not valid; training clips twice would weigh them more.
    if training and num_units < per_step:
        raise ValueError(
            f"{num_units} videos are too few for one step of {world_size} ranks x batch_size {batch_size} = {per_step} "
            "clips; start fewer ranks, lower engine.batch_size, or build shards of more videos"
        )
    return num_units // per_step if training else -(-num_units // per_step)


@dataclass(frozen=True, eq=False)
class TrainingOrder(Sequence[Unit]):
    """Every video once."""

    videos: np.ndarray
    """(N,) int32"""

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, place: int) -> Unit:  # type: ignore[override]
        return Unit(int(self.videos[place]), 0)


@dataclass(frozen=True, eq=False)
class EvaluationOrder(Sequence[Unit]):
    """Every window of every video in index order."""

    ends: np.ndarray
    """(N,) int64: number of windows up to and with each video"""

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def __getitem__(self, place: int) -> Unit:  # type: ignore[override]
        if not 0 <= place < len(self):
            raise IndexError(place)
        # "right": a video without windows ends where the one before it ends, and is passed over.
        video = int(np.searchsorted(self.ends, place, side="right"))
        return Unit(video, place - (int(self.ends[video - 1]) if video else 0))


def training_order(shards: Sequence[str] | np.ndarray, *, shuffle_span: int, seed: int, epoch: int) -> TrainingOrder:
    """The order of this epoch; `shards` is the name or number of the shard of each video, in index order.

    Shards are permuted, then videos leave a buffer of `shuffle_span` videos at random, so that reading stays near one
    place. With as many as there are videos it is a plain shuffle, with 1 there is none inside shards.
    """
    if shuffle_span < 1:
        raise ValueError(f"data.clips.shuffle_span is {shuffle_span}; give 1 for no shuffling inside shards, or more")
    generator = np.random.default_rng([seed, epoch])
    # `unique` sorts by name. Counted by first appearance, names and numbers of shards give one and the same order.
    _, firsts, inverse = np.unique(np.asarray(shards), return_index=True, return_inverse=True)
    shuffled = np.empty(len(firsts), np.int32)  # where each shard goes, the shards counted as they first appear
    shuffled[np.argsort(firsts)[generator.permutation(len(firsts))]] = np.arange(len(firsts))
    # Stable, so that the videos of a shard stay in the order in which they lie in it.
    order = np.argsort(shuffled[inverse], kind="stable").astype(np.int32)
    # Eight bytes a video, which nobody needs while the buffer runs.
    del inverse
    buffer = order[:shuffle_span].tolist()
    # Each video that comes takes a random place in the buffer, and the one that was there goes. Places are drawn in
    # blocks, because one call per video is slow for millions of them.
    for start in range(len(buffer), len(order), _DRAWN_AT_ONCE):
        given = order[start : start + _DRAWN_AT_ONCE].tolist()
        for number, place in enumerate(generator.integers(len(buffer), size=len(given)).tolist()):
            given[number], buffer[place] = buffer[place], given[number]
        order[start - len(buffer) : start - len(buffer) + len(given)] = given
    order[len(order) - len(buffer) :] = [buffer[place] for place in generator.permutation(len(buffer))]
    return TrainingOrder(order)


def evaluation_order(num_windows: Sequence[int]) -> EvaluationOrder:
    """The order of every evaluation; `num_windows` counts the windows of each video."""
    return EvaluationOrder(np.cumsum(num_windows, dtype=np.int64))


def batch_units(order: Sequence[Unit], step: int, *, batch_size: int, rank: int, world_size: int) -> list[Unit]:
    """The `batch_size` units of one step on one rank; past the end of the order they repeat its start, not valid."""
    if not 0 <= rank < world_size:
        raise ValueError(f"rank is {rank} of {world_size}; give 0 to {world_size - 1}")
    first = (step * world_size + rank) * batch_size
    # Ranks take neighbouring parts of one global batch. With fewer ranks and more accumulation the same clips make a
    # step (training/elastic.py).
    places = range(first, first + batch_size)
    return [replace(order[place % len(order)], valid=place < len(order)) for place in places]
