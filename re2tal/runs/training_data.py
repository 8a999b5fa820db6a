"""The data of a training run: its subsets and their batches.

The batches are the same ones in the same order, with the same losses, on any number of ranks.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from re2tal.config import AnyRun, RecognitionConfig
from re2tal.data.building.clips import true_classes
from re2tal.data.contract.columns import shared_ids
from re2tal.data.contract.shards import FeatureSet, ShardSet, open_any, subset_folder
from re2tal.data.streaming.stream import ClipStream, stream_clips
from re2tal.distributed import World, is_main, value_of_each_rank
from re2tal.inference import detector_input
from re2tal.localizers.losses import RunningCount
from re2tal.runs.stored_features import check_pair
from re2tal.structures import Batch, FeatureBatch, find_subset
from re2tal.training.frames import prepare_frames

Pair = tuple[ShardSet, ShardSet] | tuple[FeatureSet, FeatureSet]
"""The training and the validation subset."""


def open_both(config: AnyRun) -> Pair:
    """Both of videos, or, for a detector, both of the same features; rank 0 says which videos are in both."""
    data = config.data
    training = open_any(subset_folder(data.shards, data.training_subset))
    validation = open_any(subset_folder(data.shards, data.validation_subset))
    # The order counts too: a label is its place in the list.
    if training.classes != validation.classes:
        raise ValueError(
            f"{training.root} has classes {list(training.classes)}, {validation.root} {list(validation.classes)}; "
            "build both from one annotation file"
        )
    if is_main():
        _say_shared(training, validation)
        _say_renamed(data.training_subset, training)
        _say_renamed(data.validation_subset, validation)
    match training, validation:
        case ShardSet(), ShardSet():
            if isinstance(config, RecognitionConfig):
                for shards in (training, validation):
                    true_classes(shards)  # refuses those that are not trimmed clips
            return training, validation
        case FeatureSet(), FeatureSet():
            check_pair(training, validation)
            return training, validation
    raise ValueError(f"one of {training.root} and {validation.root} holds videos, the other features; give two alike")


def _say_shared(training: ShardSet | FeatureSet, validation: ShardSet | FeatureSet) -> None:
    """Warn of videos that a run is trained on and judged by."""
    if training.root == validation.root or not (both := shared_ids(validation.videos, training.videos)):
        return
    print(
        f"{len(both)} of {len(validation.videos)} videos of {validation.root} are in {training.root} too, such as "
        f"{both[0]!r}: figures tell little of other videos; build, or annotate, both from one annotation file",
        file=sys.stderr,
    )


def _say_renamed(subset: str, shards: ShardSet | FeatureSet) -> None:
    """Warn of a folder that was given the name of another subset."""
    if find_subset(subset, [shards.subset]) is None:
        print(
            f"{shards.root} is used as subset {subset!r}, and its manifest says that it holds {shards.subset!r}: was "
            "it renamed?",
            file=sys.stderr,
        )


def stream_of(config: AnyRun, shards: ShardSet | FeatureSet, world: World, *, training: bool) -> ClipStream:
    """This rank's batches of a subset."""
    return stream_clips(
        shards,
        config.data.clips,
        batch_size=config.engine.batch_size,
        training=training,
        rank=world.rank,
        world_size=world.world_size,
        seed=config.training.seed,
        decoder=config.data.decoder,
        # torchrun and accelerate say it; under other launchers each rank counts for itself alone.
        ranks_on_host=int(on_host) if (on_host := os.environ.get("LOCAL_WORLD_SIZE", "")).isdecimal() else 1,
    )


def alike_on_any_ranks(model: nn.Module, clips: ClipStream, *, accumulation: int) -> Callable[[], None]:
    """Makes the order of `clips`, and what losses are divided by, those of any split of a step's batches over ranks.

    The result is to be called before each optimizer step.
    """
    # Epochs of whole steps: otherwise their ends, and with them the order, would depend on the number of ranks.
    whole_steps = clips.steps_per_epoch - clips.steps_per_epoch % accumulation
    if whole_steps == 0:
        raise ValueError(
            f"an epoch has {clips.steps_per_epoch} batches per rank, too few for one step with "
            f"engine.gradient_accumulation = {accumulation}; lower it, start fewer ranks, or add videos"
        )
    clips.steps_per_epoch = whole_steps
    counts = [module for module in model.modules() if isinstance(module, RunningCount)]
    for count in counts:
        count.of_all_ranks = value_of_each_rank

    def begin_step() -> None:
        for count in counts:
            count.begin_step()

    return begin_step


def prepare(
    batch: Batch, position: int, *, strength: float, seed: int, world: World, dtype: torch.dtype
) -> torch.Tensor:
    """Colours and normalises on the device; draws by the batch's place in the run alone, on any number of ranks."""
    if isinstance(batch, FeatureBatch):
        return detector_input(batch, dtype=dtype)
    mixed = np.random.SeedSequence([seed, position * world.world_size + world.rank]).generate_state(1, np.uint64)
    generator = torch.Generator().manual_seed(int(mixed[0]))
    return prepare_frames(batch.frames, strength=strength, generator=generator, dtype=dtype)
