"""How well training is shuffled, and what that costs in reading.

    python benchmarks/shuffle.py [--quick]

shuffle_mates: of the videos of a batch of 64, the share that have another one of their shard beside them, with 64
videos a shard and the default span, over 20,000 videos; shuffle_mates_chance: the same in a plain shuffle.
shuffle_reading: seconds to read 4,096 videos of 128 KiB from the disk, not from memory, in the default order, over
those in the order of a span of 1024, in turns.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from re2tal.data.streaming.clip_config import ClipConfig
from re2tal.data.streaming.epoch_order import training_order

PER_SHARD = BATCH = 64
VIDEO_BYTES = 128 << 10
EARLIER_SPAN = 1024
"""The default that was measured before."""


def mates(num_videos: int, span: int) -> float:
    """Share of the videos that have another one of their shard in their batch."""
    shards = np.arange(num_videos) // PER_SHARD
    order = training_order(shards, shuffle_span=span, seed=0, epoch=0).videos
    batches = np.sort(shards[order][: len(order) // BATCH * BATCH].reshape(-1, BATCH))
    equal = np.diff(batches) == 0
    beside = np.pad(equal, ((0, 0), (1, 0))) | np.pad(equal, ((0, 0), (0, 1)))
    return float(beside.mean())


def reading_seconds(tars: list[Path], span: int, epoch: int) -> float:
    """To read every video of an epoch once, none of which is in memory."""
    for tar in tars:
        descriptor = os.open(tar, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    order = training_order(np.arange(len(tars) * PER_SHARD) // PER_SHARD, shuffle_span=span, seed=0, epoch=epoch)
    start = time.perf_counter()
    for video in order.videos.tolist():
        with tars[video // PER_SHARD].open("rb") as file:
            file.seek(video % PER_SHARD * VIDEO_BYTES)
            assert len(file.read(VIDEO_BYTES)) == VIDEO_BYTES
    return time.perf_counter() - start


def measure(*, quick: bool) -> dict[str, float]:
    """All figures by key."""
    span = ClipConfig().shuffle_span
    with tempfile.TemporaryDirectory() as scratch:
        tars = [Path(scratch) / f"{number}.tar" for number in range(8 if quick else 64)]
        for tar in tars:
            with tar.open("wb") as file:
                file.write(os.urandom(PER_SHARD * VIDEO_BYTES))
                file.flush()
                os.fsync(file.fileno())
        rounds = [
            reading_seconds(tars, span, epoch) / reading_seconds(tars, EARLIER_SPAN if not quick else 1, epoch)
            for epoch in range(1 if quick else 5)
        ]
    num_videos = 20_000
    return {
        "shuffle_mates": mates(num_videos, span),
        "shuffle_mates_chance": mates(num_videos, num_videos),
        "shuffle_reading": statistics.median(rounds),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    print(json.dumps(measure(quick=parser.parse_args().quick), indent=2))
