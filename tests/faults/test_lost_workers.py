"""Data workers that hang or die, again and again: each is replaced in time, and costs the clip that it was at."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
from data.folders import indexed, write_shards
from data.numbered import encode_numbered

from re2tal.data.contract.shards import ShardSet
from re2tal.data.streaming import readers
from re2tal.data.streaming.stream import ClipConfig, stream_clips
from re2tal.data.streaming.windows import Slide
from re2tal.structures import Action

SILENT_SECONDS = 6
PER_EPOCH = 5
"""As many clips as an epoch may lose."""
EPOCHS = {signal.SIGSTOP: 4, signal.SIGSEGV: 1, signal.SIGKILL: 1}


class Deadly(readers.FrameReader):
    """Ends or stops its process at each of the first videos."""

    number: int

    def read(self, number, window, generator, *, into):
        if number < PER_EPOCH and multiprocessing.parent_process() is not None:
            os.kill(os.getpid(), self.number)
        super().read(number, window, generator, into=into)


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> ShardSet:
    videos = {f"v{n}": (encode_numbered(40), indexed(40, actions=[Action(0.2, 0.9, "x")])) for n in range(8)}
    root: Path = tmp_path_factory.mktemp("stream")
    return write_shards(root / "training", videos, per_shard=4)


@pytest.mark.slow
@pytest.mark.parametrize("number", EPOCHS)
def test_every_worker_that_is_lost_is_replaced_in_time_and_costs_one_clip(number, shards, record_property):
    record_property("tried", PER_EPOCH * EPOCHS[number])
    silent = SILENT_SECONDS if number == signal.SIGSTOP else 120
    windowing = Slide(32, frames_per_second=15, overlap=0.5)
    config = ClipConfig(windowing=windowing, size=48, fit="stretch", crop_area=(1, 1), flip=False, workers=2)
    stream = stream_clips(shards, replace(config, timeout_seconds=silent), batch_size=1, training=True)
    reader = stream._batches.reader
    deadly = Deadly(shards, reader.size, reader.fit, reader.crop_area, reader.crop_aspect, reader.flip)
    object.__setattr__(deadly, "number", number)
    stream._batches.reader = deadly
    for epoch in range(EPOCHS[number]):
        stream.failures.clear()
        began = time.monotonic()
        batches = list(stream.epoch(epoch))
        assert len(batches) == stream.steps_per_epoch == 8
        lost = sorted(batch.video_ids[0] for batch in batches if not batch.valid.any())
        assert lost == sorted(stream.failures) == [f"v{n}" for n in range(PER_EPOCH)]
        assert (time.monotonic() - began) / PER_EPOCH < 30
