"""Batches of clips from a shard folder, in the order that the plan gives.

    plan (step -> units) -> worker: read the pair -> check -> decode -> crop, resize -> ClipBatch of uint8 -> rank
                                                             -> interpolate -> FeatureBatch

A worker process makes whole steps, and step b is the same batch whoever makes it: everything random is drawn from
(seed, epoch, video). So the number of workers changes nothing, and an epoch is entered at any step without reading
what came before. A video that cannot be read is replaced by a blank clip that is not `valid`, and reported; the
number of steps stands. So is the clip at which a worker dies or hangs; the workers are then started anew.
"""

from __future__ import annotations

import logging
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.sharedctypes import RawArray
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler, get_worker_info

from re2tal.data.contract.columns import columns_of
from re2tal.data.contract.shards import FeatureSet, ShardSet
from re2tal.data.streaming.augmentation import AUGMENTATIONS, Augmentation
from re2tal.data.streaming.collate import Clip, new_content
from re2tal.data.streaming.decode import DecodeError, DecoderName, check_decoder
from re2tal.data.streaming.epoch_order import Unit, batch_units, count_steps, evaluation_order, training_order
from re2tal.data.streaming.readers import ClipReader, FeatureReader, FrameReader
from re2tal.data.streaming.windows import Slide, Stored, Trimmed, Window, Windowing, draw_window, plan_windows
from re2tal.data.streaming.workers import (
    PatientLoader,
    check_shared_memory,
    heed_only_the_parent,
    no_garbage_to_inherit,
    start_method,
    stop_signals_blocked,
)
from re2tal.options import option
from re2tal.structures import Batch

logger = logging.getLogger(__name__)

MAX_FAILED_CLIPS, MAX_FAILED_SHARE = 5, 0.001
"""Training stops when more clips of an epoch fail than both: a few bad videos are tolerated, many are an error."""


@dataclass(frozen=True)
class ClipConfig:
    """How videos become clips. The settings of pictures have no effect on stored features."""

    windowing: Windowing = field(default_factory=Slide)
    """which frames make a clip"""
    size: int = 224
    """height and width of a clip, pixels"""
    fit: Literal["crop", "stretch"] = "crop"
    """how a whole picture becomes square: its middle is cut out, or it is squeezed"""
    crop_area: tuple[float, float] = (0.08, 1.0)
    """in training, least and largest share of the picture that a random crop shows; 1 1 for the whole picture"""
    crop_aspect: tuple[float, float] = (3 / 4, 4 / 3)
    """in training, narrowest and widest random crop, width over height"""
    flip: bool = True
    """in training, mirror every second clip; switch it off where left and right are different actions"""
    colour_jitter: float = 0.0
    """in training, strength of the random change of colours, 0 to 1; applied on the device"""
    augmentation: Augmentation = option("none", planned=False)
    """in training, what else happens to a clip's pixels: opentad draws two of ImgAug's fifteen operations, then
    mmaction2's ColorJitter, as OpenTAD's recipes do; none"""
    shuffle_span: int = 1024
    """in training, how many videos are shuffled together; more than there are: a plain shuffle"""
    workers: int = option(2, resumable=True, planned=False)
    """processes per rank that read and decode; 0: the training process itself"""
    prefetch: int = option(2, resumable=True, planned=False)
    """batches that each worker keeps ready"""
    timeout_seconds: int = option(300, resumable=True, planned=False)
    """replace a worker that is silent for so long, and leave out its clip; 0: no limit"""
    allow_missing: bool = False
    """in evaluation, go on without videos that cannot be read; they then count as without detections"""

    def __post_init__(self) -> None:
        for name, least in (("size", 1), ("workers", 0), ("prefetch", 1), ("timeout_seconds", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"data.clips.{name} is {getattr(self, name)}; give {least} or more")
        for name in ("crop_area", "crop_aspect"):
            least_share, most = getattr(self, name)
            if not 0 < least_share <= most or (name == "crop_area" and most > 1):
                raise ValueError(f"data.clips.{name} is {getattr(self, name)}; give two positive numbers, least first")
        if self.augmentation not in AUGMENTATIONS:
            raise ValueError(f"data.clips.augmentation is {self.augmentation!r}; known: {', '.join(AUGMENTATIONS)}")
        if self.fit == "stretch" and isinstance(self.windowing, Trimmed) and self.windowing.num_crops > 1:
            raise ValueError(
                f"data.clips.windowing.num_crops is {self.windowing.num_crops}, but data.clips.fit stretch shows the "
                "whole picture; give 1 crop, or fit crop"
            )


@dataclass(frozen=True, slots=True)
class Failure:
    """A clip that could not be read."""

    video_id: str
    shard: str
    reason: str


Plan = Callable[[Stored], list[Window]]
"""A video -> the windows of it to look at."""


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
    batches = _Batches(reader, config, plan, batch_size, training, rank, world_size, seed)
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

    def __init__(self, batches: _Batches, *, ranks_on_host: int = 1) -> None:
        self.steps_per_epoch: int = batches.num_steps
        self.failures: dict[str, Failure] = {}
        """video id -> what was wrong with it, over all epochs"""
        self._batches = batches
        self._losses = 0
        self._keys = _Keys()
        config = batches.config
        workers = config.workers
        if workers:
            check_shared_memory(batches.num_bytes, workers=workers, prefetch=config.prefetch, ranks=ranks_on_host)
        self._loader = self._new_loader()

    def _new_loader(self) -> PatientLoader:
        config = self._batches.config
        workers = config.workers
        loader = PatientLoader(
            self._batches,
            sampler=self._keys,
            batch_size=None,
            num_workers=workers,
            pin_memory=torch.cuda.is_available(),
            prefetch_factor=config.prefetch if workers else None,
            persistent_workers=workers > 0,
            multiprocessing_context=start_method() if workers else None,
            # Its own, or each epoch would draw a number from the global one.
            generator=torch.Generator(),
            worker_init_fn=heed_only_the_parent if workers else None,
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
            failed += len(failures)
            self._report(failures)
            if failed > self._batches.max_failed:
                raise ValueError(self._too_many(failed, epoch))
            yield batch

    def order(self, epoch: int) -> Sequence[Unit]:
        """The clips of an epoch, of all ranks together, in their order."""
        return self._batches._epoch_order(epoch)

    def _made(self, epoch: int, step: int) -> Iterator[tuple[Batch, list[Failure]]]:
        """Batches and what failed in them; where a worker is lost, all are replaced, and go on with the same step."""
        while step < self.steps_per_epoch:
            self._keys.steps = [(epoch, later) for later in range(step, self.steps_per_epoch)]
            try:
                for made in self._start():
                    yield made
                    step += 1
            except RuntimeError as error:
                self._replace_workers(epoch, error)

    def _replace_workers(self, epoch: int, error: RuntimeError) -> None:
        """Leave out the clips that lost workers were at; raises `error` where no worker was lost, or again and again
        without a clip."""
        workers = self._loader.workers
        dead = [number for number, worker in enumerate(workers) if not worker.is_alive()]
        if not dead:
            raise error
        clips = [(epoch, *self._batches.at_work(number)) for number in dead]
        lost = [clip for clip in clips if clip[1] >= 0]
        self._losses += not lost
        if self._losses > MAX_FAILED_CLIPS:
            raise error
        for number, worker in enumerate(workers):
            if number in dead:
                logger.warning("worker %d (exit code %s) is replaced", number, worker.exitcode)
            worker.kill()  # one that died may hold the lock of the queue that all write to
            worker.join()
        self._batches.lost.update(lost)
        self._batches.forget_work()
        self._loader = self._new_loader()

    def _start(self) -> Iterator[tuple[Batch, list[Failure]]]:
        if not self._batches.config.workers:
            return iter(self._loader)
        with stop_signals_blocked(), no_garbage_to_inherit():  # workers that start here inherit both
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


@dataclass
class _Batches(Dataset[tuple[Batch, list[Failure]]]):
    """(epoch, step) -> the batch of this rank; runs in the workers."""

    reader: ClipReader
    config: ClipConfig
    plan: Plan
    batch_size: int
    training: bool
    rank: int
    world_size: int
    seed: int

    def __post_init__(self) -> None:
        videos = self.reader.folder.videos
        columns = columns_of(videos)
        self._shards = columns["shard"]
        self.lost: set[tuple[int, int, int]] = set()
        """(epoch, video, window) of clips at which a worker was lost"""
        # Of each worker, the video and window it reads; both count from 1, and 0 is none.
        self._at_work = RawArray("q", 2 * max(1, self.config.workers))
        self._order: tuple[int, Sequence[Unit]] | None = None
        if self.training:
            if len(videos):
                self.plan(videos[int(columns["samples_per_second"].argmin())])  # raises where the rate is too low
            num_units = len(videos)
        else:
            order = evaluation_order([len(self.plan(video)) for video in videos])
            self._order = (0, order)
            num_units = len(order)
        try:
            self.num_steps = count_steps(
                num_units, batch_size=self.batch_size, world_size=self.world_size, training=self.training
            )
        except ValueError as error:
            raise ValueError(f"{self.reader.folder.root}: {error}") from None
        self.max_failed = max(MAX_FAILED_CLIPS, int(MAX_FAILED_SHARE * num_units))
        if not self.training:
            self.max_failed = num_units if self.config.allow_missing else 0

    def __getitem__(self, key: tuple[int, int]) -> tuple[Batch, list[Failure]]:
        epoch, step = key
        units = batch_units(
            self._epoch_order(epoch), step, batch_size=self.batch_size, rank=self.rank, world_size=self.world_size
        )
        failures: list[Failure] = []
        drawn = [self._draw(unit, epoch) for unit in units]
        content = new_content((len(units), *self.reader.shape(drawn[0][0])), self.reader.dtype)
        clips = [
            self._clip(unit, epoch, *one, into=place, failures=failures)
            for unit, one, place in zip(units, drawn, content, strict=True)
        ]
        return self.reader.collate(content, clips), failures

    @property
    def num_bytes(self) -> int:
        """Of the content of a batch."""
        window = self.plan(self.reader.folder.videos[0])[0]
        return self.batch_size * math.prod(self.reader.shape(window)) * self.reader.dtype.itemsize

    def _epoch_order(self, epoch: int) -> Sequence[Unit]:
        if self._order is None or (self.training and self._order[0] != epoch):
            order = training_order(self._shards, shuffle_span=self.config.shuffle_span, seed=self.seed, epoch=epoch)
            self._order = (epoch, order)
        return self._order[1]

    def _draw(self, unit: Unit, epoch: int) -> tuple[Window, np.random.Generator]:
        """The window of a unit, and the generator of everything else that is drawn for it."""
        video = self.reader.folder.videos[unit.video]
        generator = np.random.default_rng([self.seed, epoch, zlib.crc32(video.record.video_id.encode())])
        if self.training:
            return draw_window(video, self.config.windowing, generator=generator), generator
        return self.plan(video)[unit.window], generator

    def _clip(
        self,
        unit: Unit,
        epoch: int,
        window: Window,
        generator: np.random.Generator,
        *,
        into: Tensor,
        failures: list[Failure],
    ) -> Clip:
        """Fills `into`; with zeros for a clip that cannot be read or only fills a batch."""
        video = self.reader.folder.videos[unit.video]
        clip = Clip(
            mask=torch.from_numpy(window.mask),
            actions=window.actions,
            timeline=window.timeline,
            video_id=video.record.video_id,
            window_id=window.window_id,
            valid=True,
        )
        if unit.valid:
            try:
                if (epoch, unit.video, unit.window) in self.lost:
                    raise DecodeError("the worker that read it died, was killed, or was silent for too long")
                self._note((unit.video + 1, unit.window + 1))
                self.reader.read(unit.video, window, generator, into=into)
                return clip
            except DecodeError as error:
                failures.append(Failure(clip.video_id, video.shard, str(error)))
            finally:
                self._note((0, 0))
        into.zero_()
        return clip._replace(actions=(), valid=False)

    def _note(self, clip: tuple[int, int]) -> None:
        if (worker := get_worker_info()) is not None:
            self._at_work[2 * worker.id : 2 * worker.id + 2] = clip

    def at_work(self, worker: int) -> tuple[int, int]:
        """Video and window that a worker reads, or read when it was lost; -1, -1 where it reads none."""
        video, window = self._at_work[2 * worker : 2 * worker + 2]
        return video - 1, window - 1

    def forget_work(self) -> None:
        """Begin with workers that read nothing."""
        self._at_work[:] = [0] * len(self._at_work)
