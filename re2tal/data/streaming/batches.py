"""One batch: the clips of a step, read, and what became of those that could not be read. Runs in the workers."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.sharedctypes import RawArray

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from re2tal.data.contract.columns import columns_of
from re2tal.data.streaming.clip_config import ClipConfig
from re2tal.data.streaming.collate import Clip, collate, new_content
from re2tal.data.streaming.decode import DecodeError
from re2tal.data.streaming.epoch_order import Unit, batch_units, count_steps, evaluation_order, training_order
from re2tal.data.streaming.readers import ClipReader
from re2tal.data.streaming.windows import Stored, Window, draw_window
from re2tal.structures import Batch

MAX_FAILED_CLIPS, MAX_FAILED_SHARE = 5, 0.001
"""Training stops when more clips of an epoch fail than both: a few bad videos are tolerated, many are an error."""


@dataclass(frozen=True, slots=True)
class Failure:
    """A clip that could not be read."""

    video_id: str
    shard: str
    reason: str


Plan = Callable[[Stored], list[Window]]
"""A video -> the windows of it to look at."""


@dataclass
class Batches(Dataset[tuple[Batch, list[Failure]]]):
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
        # From the columns: to parse every line of a large index would hold up the start of each worker.
        self._shards = columns["shard"]
        self.lost: set[tuple[int, int, int]] = set()
        """(epoch, video, window) of clips at which a worker was lost"""
        # Of each worker, the video and window it reads; both count from 1, and 0 is none.
        # Shared with the workers, and without a lock: a worker that is killed while it holds one would keep it for
        # ever, and each worker writes only its own two numbers.
        self._at_work = RawArray("q", 2 * max(1, self.config.workers))
        self._order: tuple[int, Sequence[Unit]] | None = None
        if self.training:
            if len(videos):
                self.plan(videos[int(columns["samples_per_second"].argmin())])  # raises where the rate is too low
            num_units = len(videos)
            self.max_failed = max(MAX_FAILED_CLIPS, int(MAX_FAILED_SHARE * num_units))
        else:
            # Every window of an evaluation is counted before the first is read, so that all ranks know the number of
            # steps.
            order = evaluation_order([len(self.plan(video)) for video in videos])
            self._order = (0, order)
            num_units = len(order)
            # A video that is left out counts as one without detections, so one alone would change the result.
            self.max_failed = num_units if self.config.allow_missing else 0
        try:
            self.num_steps = count_steps(
                num_units, batch_size=self.batch_size, world_size=self.world_size, training=self.training
            )
        except ValueError as error:
            # The pure plan knows no folder; whoever reads the message has to.
            raise ValueError(f"{self.reader.folder.root}: {error}") from None

    def __getitem__(self, key: tuple[int, int]) -> tuple[Batch, list[Failure]]:
        epoch, step = key
        units = batch_units(
            self._epoch_order(epoch), step, batch_size=self.batch_size, rank=self.rank, world_size=self.world_size
        )
        failures: list[Failure] = []
        # All windows of a stream are equally long: the first one gives the shape of the batch.
        drawn = [self._draw(unit, epoch) for unit in units]
        content = new_content((len(units), *self.reader.shape(drawn[0][0])), self.reader.dtype)
        clips = [
            self._clip(unit, epoch, *one, into=place, failures=failures)
            for unit, one, place in zip(units, drawn, content, strict=True)
        ]
        return collate(self.reader.batch, content, clips), failures

    @property
    def num_bytes(self) -> int:
        """Of the content of a batch."""
        window = self.plan(self.reader.folder.videos[0])[0]
        return self.batch_size * math.prod(self.reader.shape(window)) * self.reader.dtype.itemsize

    def _epoch_order(self, epoch: int) -> Sequence[Unit]:
        if self._order is None or (self.training and self._order[0] != epoch):
            # Kept for the epoch: each worker makes the whole order itself, so none of it is sent between processes.
            order = training_order(self._shards, shuffle_span=self.config.shuffle_span, seed=self.seed, epoch=epoch)
            self._order = (epoch, order)
        return self._order[1]

    def _draw(self, unit: Unit, epoch: int) -> tuple[Window, np.random.Generator]:
        """The window of a unit, and the generator of everything else that is drawn for it."""
        video = self.reader.folder.videos[unit.video]
        # Not hash(), which differs from process to process. By the video and not by its place, so that another batch
        # size, or another number of ranks, draws the same clip of it.
        generator = np.random.default_rng([self.seed, epoch, zlib.crc32(video.record.video_id.encode())])
        if self.training:
            # The window is drawn first, the pixels go on with the same generator: another order would change every
            # seeded run.
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
                # What ended one worker would end the next one too.
                if (epoch, unit.video, unit.window) in self.lost:
                    raise DecodeError("the worker that read it died, was killed, or was silent for too long")
                # Before it is read: a worker that dies of it cannot say so afterwards.
                self._note((unit.video + 1, unit.window + 1))
                self.reader.read(unit.video, window, generator, into=into)
                return clip
            except DecodeError as error:
                failures.append(Failure(clip.video_id, video.shard, str(error)))
            finally:
                self._note((0, 0))
        # The memory was handed out as it was; what another batch left there must not train.
        into.zero_()
        # The batch keeps its size, because the other ranks wait for this one in every step; `valid` takes the clip out
        # of the loss and the result.
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
