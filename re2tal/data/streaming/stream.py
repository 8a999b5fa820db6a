"""Batches of clips from a shard folder, in the order that the plan gives.

    plan (step -> units) -> worker: read the pair -> check -> decode -> crop, resize -> ClipBatch of uint8 -> rank
                                                             -> interpolate -> FeatureBatch

A worker process makes whole steps, and step b is the same batch whoever makes it: everything random is drawn from
(seed, epoch, video). So the number of workers changes nothing, and an epoch is entered at any step without reading
what came before. A video that cannot be read is replaced by a blank clip that is not `valid`, and reported; the
number of steps stays the same. So is the clip that a worker reads when it dies or hangs; all workers are then replaced.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch.utils.data import Sampler

from re2tal.data.contract.shards import FeatureSet, ShardSet
from re2tal.data.streaming.batches import MAX_FAILED_CLIPS, Batches, Failure, Plan
from re2tal.data.streaming.clip_config import ClipConfig
from re2tal.data.streaming.decode import DecoderName, check_decoder
from re2tal.data.streaming.epoch_order import Unit
from re2tal.data.streaming.readers import ClipReader, FeatureReader, FrameReader
from re2tal.data.streaming.windows import plan_windows
from re2tal.data.streaming.workers import (
    PatientLoader,
    check_shared_memory,
    no_collections,
    start_method,
    start_worker,
    stop_signals_blocked,
)
from re2tal.structures import Batch

logger = logging.getLogger(__name__)


def stream_clips(
    shards: ShardSet | FeatureSet,
    config: ClipConfig,
    *,
    batch_size: int,
    training: bool,
    rank: int = 0,
    world_size: int = 1,
    seed: int = 0,
    plan: Plan | None = None,
    decoder: DecoderName = "decord",
    ranks_on_host: int = 1,
) -> ClipStream:
    """One rank's batches: ClipBatch from shards of videos, FeatureBatch from those of features.

    `plan` says which windows of a video an evaluation looks at; by default those of `plan_windows`. `ranks_on_host`
    share this host's memory for workers.

    Raises:
        ValueError: if the split is too small for the ranks, or shared memory for the workers, if features come at
            another rate than the windows ask for, or if `decoder` cannot be loaded.
    """
    check_decoder(decoder)
    plan = plan or partial(plan_windows, windowing=config.windowing)
    reader = _reader(shards, config, training=training, decoder=decoder)
    batches = Batches(reader, config, plan, batch_size, training, rank, world_size, seed)
    return ClipStream(batches, ranks_on_host=ranks_on_host)


def _reader(shards: ShardSet | FeatureSet, config: ClipConfig, *, training: bool, decoder: DecoderName) -> ClipReader:
    if isinstance(shards, FeatureSet):
        return FeatureReader(shards, config.windowing)
    return FrameReader(
        shards,
        size=config.size,
        fit=config.fit,
        crop_area=config.crop_area if training else (1, 1),
        crop_aspect=config.crop_aspect,
        flip=training and config.flip,
        augmentation=config.augmentation if training else "none",
        decoder=decoder,
    )


class ClipStream:
    """An endless supply of epochs, each with the same number of steps on every rank."""

    def __init__(self, batches: Batches, *, ranks_on_host: int = 1) -> None:
        self.steps_per_epoch: int = batches.num_steps
        self.failures: dict[str, Failure] = {}
        """video id -> what was wrong with it, over all epochs"""
        self._batches = batches
        # Workers lost while they read no clip; the clips of others are left out one by one, and counted as failed.
        self._losses = 0
        self._keys = _Keys()
        config = batches.config
        workers = config.workers
        # Before any worker starts: one that runs out of shared memory dies of a bus error, which names no cause.
        if workers:
            check_shared_memory(batches.num_bytes, workers=workers, prefetch=config.prefetch, ranks=ranks_on_host)
        self._loader = self._new_loader()

    def _new_loader(self) -> PatientLoader:
        config = self._batches.config
        workers = config.workers
        loader = PatientLoader(
            self._batches,
            sampler=self._keys,
            # `Batches` makes whole batches: nothing is put together here.
            batch_size=None,
            num_workers=workers,
            # Else copies to the device would wait for the host (`ClipBatch.to` does not block).
            pin_memory=torch.cuda.is_available(),
            prefetch_factor=config.prefetch if workers else None,
            persistent_workers=workers > 0,
            multiprocessing_context=start_method() if workers else None,
            # Its own, or each epoch would draw a number from the global one.
            generator=torch.Generator(),
            worker_init_fn=start_worker if workers else None,
        )
        loader.silent_seconds = config.timeout_seconds
        return loader

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """The batches of steps `start_step` to `steps_per_epoch` - 1 of an epoch, the same ones each time.

        Raises:
            ValueError: if too many clips cannot be read: in evaluation one, unless `allow_missing`.
        """
        if not 0 <= start_step <= self.steps_per_epoch:
            raise ValueError(f"start_step is {start_step}; an epoch has steps 0 to {self.steps_per_epoch - 1}")
        failed = 0
        for batch, failures in self._made(epoch, start_step):
            # Counted by the clip and for one epoch, on this rank: the same bad video comes again in the next epoch.
            failed += len(failures)
            self._report(failures)
            if failed > self._batches.max_failed:
                raise ValueError(self._too_many(failed, epoch))
            yield batch

    def order(self, epoch: int) -> Sequence[Unit]:
        """The clips of an epoch, of all ranks together, in their order."""
        return self._batches._epoch_order(epoch)

    def _made(self, epoch: int, step: int) -> Iterator[tuple[Batch, list[Failure]]]:
        """Batches and what failed in them. If a worker is lost, all are replaced, and go on with the same step."""
        # `step` counts what was handed out, so a batch that was lost in a worker is asked for again.
        while step < self.steps_per_epoch:
            self._keys.steps = [(epoch, later) for later in range(step, self.steps_per_epoch)]
            try:
                for made in self._start():
                    yield made
                    step += 1
            except RuntimeError as error:
                self._replace_workers(epoch, error)

    def _replace_workers(self, epoch: int, error: RuntimeError) -> None:
        """Replaces all workers, and leaves out the clips that lost ones were reading.

        Raises `error` if no worker was lost, or if workers are lost too often while they read no clip.
        """
        workers = self._loader.workers
        dead = [number for number, worker in enumerate(workers) if not worker.is_alive()]
        # A RuntimeError of the reading itself. torch raises the same class for a dead worker, so only the processes
        # tell.
        if not dead:
            raise error
        clips = [(epoch, *self._batches.at_work(number)) for number in dead]
        lost = [clip for clip in clips if clip[1] >= 0]
        # Without a clip to leave out, the same may happen for ever.
        self._losses += not lost
        if self._losses > MAX_FAILED_CLIPS:
            raise error
        for number, worker in enumerate(workers):
            if number in dead:
                logger.warning("worker %d (exit code %s) is replaced", number, worker.exitcode)
            worker.kill()  # one that died may hold the lock of the queue that all write to
            worker.join()
        # Before the new workers start, which inherit what this process knows at that moment.
        self._batches.lost.update(lost)
        self._batches.forget_work()
        self._loader = self._new_loader()

    def _start(self) -> Iterator[tuple[Batch, list[Failure]]]:
        if not self._batches.config.workers:
            return iter(self._loader)
        with stop_signals_blocked(), no_collections():  # workers that start here inherit both
            return iter(self._loader)

    def _report(self, failures: list[Failure]) -> None:
        for failure in failures:
            if failure.video_id not in self.failures:
                logger.warning("%s in %s is left out: %s", failure.video_id, failure.shard, failure.reason)
            self.failures[failure.video_id] = failure

    def _too_many(self, failed: int, epoch: int) -> str:
        shown = "; ".join(f"{f.video_id} in {f.shard}: {f.reason}" for f in list(self.failures.values())[:5])
        return (
            f"{failed} clips of epoch {epoch} cannot be read from {self._batches.reader.folder.root}, more than "
            f"{self._batches.max_failed}: {shown}; run re2tal shards verify, then replace or rebuild the shards"
        )


class _Keys(Sampler[tuple[int, int]]):
    """(epoch, step) of the batches to make; set in the training process, so workers live on from epoch to epoch."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, int]] = []

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self.steps)

    def __len__(self) -> int:
        return len(self.steps)
