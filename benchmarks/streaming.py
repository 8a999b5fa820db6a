"""Clips per second and CPU seconds per clip of the data path, for several numbers of workers.

    python benchmarks/streaming.py [--shards DIR] [--quick] [--json FILE]

Without --shards a demo data set is written and packed first. CPU seconds count the training process and its workers,
from the first batch asked for to the last one here; they hardly depend on what else the machine does, clips per second
do. Cores that a node needs = clips per second wanted x CPU seconds per clip x 1.3.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from re2tal.data.building.annotations import read_annotations
from re2tal.data.building.build import BuildConfig, build_shards
from re2tal.data.building.demo import DemoConfig, write_demo
from re2tal.data.contract.manifest import Encoding, FramesPerSecond
from re2tal.data.contract.members import read_content
from re2tal.data.contract.shards import ShardSet, open_shards
from re2tal.data.streaming.decode import decode_frames
from re2tal.data.streaming.stream import ClipConfig, stream_clips
from re2tal.data.streaming.transforms import Box, crop_and_resize
from re2tal.data.streaming.windows import Slide, plan_windows
from re2tal.strict_json import write_json


@dataclass(frozen=True)
class Row:
    """One measurement."""

    workers: int
    clips: int
    clips_per_second: float
    cpu_seconds_per_clip: float
    first_batch_seconds: float


def demo_shards(folder: Path, *, num_videos: int) -> ShardSet:
    """The training subset of a demo data set, packed as its catalog row says: 96 pixels, 16 frames a second."""
    annotations = write_demo(folder / "demo", DemoConfig(num_training=num_videos, num_validation=1))
    build_shards(
        read_annotations(annotations),
        videos=folder / "demo" / "videos",
        out=folder / "shards",
        subset="training",
        config=BuildConfig(dataset="demo", encoding=Encoding(FramesPerSecond(16.0), short_side=96), workers=2),
    )
    return open_shards(folder / "shards" / "training")


def measure(shards: ShardSet, config: ClipConfig, *, batch_size: int, epochs: int) -> Row:
    """Stream `epochs` epochs of training clips, and throw them away."""
    cpu_before, start = cpu_seconds(), time.perf_counter()
    stream = stream_clips(shards, config, batch_size=batch_size, training=True)
    clips, first = 0, 0.0
    for epoch in range(epochs):
        for batch in stream.epoch(epoch):
            first = first or time.perf_counter() - start
            clips += len(batch.video_ids)
    seconds = time.perf_counter() - start
    del stream, batch  # children are counted when they have ended
    cpu = cpu_seconds() - cpu_before
    return Row(config.workers, clips, clips / seconds, cpu / clips, first)


def cpu_seconds() -> float:
    """User and system time of this process and of the children that it has waited for."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def stages(shards: ShardSet, config: ClipConfig) -> dict[str, float]:
    """CPU milliseconds of each stage, mean over up to 32 clips."""
    totals = {"read and check": 0.0, "decode": 0.0, "resize": 0.0}
    videos = shards.videos[:32]
    for video in videos:
        window = plan_windows(video, config.windowing)[0]
        start = time.process_time()
        mp4 = read_content(shards, video)
        read = time.process_time()
        frames = decode_frames(mp4, window.indices[: window.num_valid])
        decoded = time.process_time()
        crop_and_resize(frames, Box(0, 0, *frames.shape[1:3]), size=config.size)
        for name, seconds in zip(totals, (read - start, decoded - read, time.process_time() - decoded), strict=True):
            totals[name] += 1000 * seconds / len(videos)
    return totals


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=Path, help="a shard folder; a demo data set is made without it")
    parser.add_argument("--frames", type=int, default=128, help="frames of a clip")
    parser.add_argument("--fps", type=float, default=8.0, help="frames per second of a clip")
    parser.add_argument("--size", type=int, default=64, help="height and width of a clip")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="12 demo videos, one epoch")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    windowing = Slide(arguments.frames, frames_per_second=arguments.fps)
    config = ClipConfig(windowing=windowing, size=arguments.size, fit="stretch", crop_area=(1, 1), flip=False)
    with ExitStack() as cleanup:
        if arguments.shards:
            shards = open_shards(arguments.shards)
        else:
            folder = Path(cleanup.enter_context(tempfile.TemporaryDirectory()))
            shards = demo_shards(folder, num_videos=12 if arguments.quick else 64)
        epochs = 1 if arguments.quick else arguments.epochs
        rows = [
            measure(shards, replace(config, workers=workers), batch_size=arguments.batch_size, epochs=epochs)
            for workers in arguments.workers
        ]
        milliseconds = stages(shards, config)

    print(f"clips of {arguments.frames} frames at {arguments.fps:g}/s, {arguments.size} x {arguments.size}")
    print(f"{'workers':>8}{'clips':>8}{'clips/s':>10}{'CPU-s/clip':>12}{'first batch, s':>16}")
    for row in rows:
        print(
            f"{row.workers:>8}{row.clips:>8}{row.clips_per_second:>10.1f}{row.cpu_seconds_per_clip:>12.4f}"
            f"{row.first_batch_seconds:>16.2f}"
        )
    print("CPU ms per clip: " + ", ".join(f"{name} {value:.1f}" for name, value in milliseconds.items()))
    if arguments.json:
        write_json(arguments.json, {"rows": [asdict(row) for row in rows], "cpu_milliseconds": milliseconds})


if __name__ == "__main__":
    main()
