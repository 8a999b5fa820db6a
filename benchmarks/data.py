"""What streaming costs as videos grow long, clips many, and the index large.

    python benchmarks/data.py [--quick] --json FILE

Keys: long_vs_short (CPU-seconds of a window of a 60 min file over one of a 1 min file, cut from the same windows in
turns), leak (growth of memory over 10,000 clips, as a share), open_million_s and open_million_mib (opening an index of
a million videos: seconds, and memory that no other process shares), order_million_s and order_million_mib (one epoch's
order), path_vs_decord (CPU-seconds of training clips of 256 frames as a ClipBatch over decord's for the same frames,
handed over by dlpack, in turns), path_vs_torchcodec (the same with torchcodec, where it is installed), loader_wait
(share of its time that a consumer as slow as decoding waits for 2 workers), relabel_share (see relabel.py),
shuffle_mates, shuffle_mates_chance and shuffle_reading (see shuffle.py).
`--quick`: 10 min, 1,000 clips and 100,000 videos; the keys stay.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import hashlib
import importlib.util
import io
import itertools
import json
import multiprocessing
import statistics
import tempfile
import time
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import av
import decord
import numpy as np
import relabel
import shuffle
import torch
from torch import Tensor

from re2tal.data.building.encode import normalise_video
from re2tal.data.building.probe import probe_video
from re2tal.data.contract.columns import columns_of, write_columns
from re2tal.data.contract.manifest import (
    INDEX_NAME,
    MANIFEST_NAME,
    Encoding,
    FramesPerSecond,
    IndexedVideo,
    Manifest,
    ShardFile,
    Totals,
    to_json,
)
from re2tal.data.contract.members import read_content
from re2tal.data.contract.shards import Pair, open_shards, write_tar
from re2tal.data.streaming.clip_config import ClipConfig
from re2tal.data.streaming.decode import DecoderName
from re2tal.data.streaming.epoch_order import training_order
from re2tal.data.streaming.stream import stream_clips
from re2tal.data.streaming.windowing import Slide
from re2tal.structures import Action, VideoRecord

SHARD = "shard-000000.tar"
FPS = 15


def stored_video(seconds: int, *, height: int = 216, width: int = 288) -> bytes:
    """Moving noise at 15 frames per second, normalised as `re2tal shards build` does by default."""
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 255, (-(-height // 6), -(-width // 6), 3), dtype=np.uint8).repeat(6, 0).repeat(6, 1)
    picture = np.ascontiguousarray(picture[:height, :width])
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "source.mp4", Path(folder) / "stored.mp4"
        with av.open(str(source), "w") as container:
            stream = container.add_stream("libx264", rate=FPS, options={"crf": "18", "preset": "ultrafast"})
            stream.width, stream.height, stream.pix_fmt = picture.shape[1], picture.shape[0], "yuv420p"
            for number in range(seconds * FPS):
                frame = av.VideoFrame.from_ndarray(np.roll(picture, (3 * number, 7 * number), (0, 1)), format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        normalise_video(source, target, probe=probe_video(source), encoding=Encoding(FramesPerSecond(FPS)))
        return target.read_bytes()


def write_folder(root: Path, entries: list[IndexedVideo], shards: list[ShardFile]) -> None:
    """Index and manifest of tars that are there."""
    lines = [(to_json(entry) + "\n").encode() for entry in entries]
    index = b"".join(lines)
    index_sha256 = hashlib.sha256(index).hexdigest()
    (root / INDEX_NAME).write_bytes(index)
    write_columns(root, entries, lines, index_sha256=index_sha256)
    frames = sum(entry.num_frames for entry in entries)
    manifest = Manifest(
        format="re2tal-shards",
        version=1,
        dataset="benchmark",
        subset="training",
        classes=("x",),
        encoding=Encoding(FramesPerSecond(FPS)),
        seed=0,
        tools={},
        totals=Totals(len(entries), frames, frames / FPS, sum(shard.num_bytes for shard in shards)),
        rejected=(),
        index_sha256=index_sha256,
        shards=tuple(shards),
    )
    (root / MANIFEST_NAME).write_text(to_json(manifest))


def write_video(root: Path, seconds: int, *, height: int = 216, width: int = 288) -> Path:
    """A folder of one video."""
    root.mkdir()
    mp4 = stored_video(seconds, height=height, width=width)
    ((offset, num_bytes),) = write_tar(root / SHARD, [Pair("v", b"{}", mp4)])
    record = VideoRecord("v", "training", float(seconds), (Action(0.0, float(seconds), "x"),))
    entry = IndexedVideo(record, SHARD, offset, num_bytes, seconds * FPS, FPS, width, height, zlib.crc32(mp4))
    tar = (root / SHARD).read_bytes()
    write_folder(root, [entry], [ShardFile(SHARD, len(tar), hashlib.sha256(tar).hexdigest(), 1)])
    return root


def window_seconds(root: Path, count: int) -> float:
    """CPU-seconds of one window, of so many that follow each other; the first opens the video."""
    clips = ClipConfig(windowing=Slide(64, frames_per_second=FPS, overlap=0), workers=0, size=112)
    batches = stream_clips(open_shards(root), clips, batch_size=1, training=False).epoch(0)
    spent, start = [], time.process_time()
    for batch in itertools.islice(batches, count):
        assert batch.valid.all()
        spent.append(time.process_time())
    return (spent[-1] - start) / len(spent)


def decord_frames(mp4: bytes, numbers: np.ndarray) -> Tensor:
    """As directly as decord gives them."""
    reader = decord.VideoReader(io.BytesIO(mp4), ctx=decord.cpu(0), num_threads=1)
    return torch.utils.dlpack.from_dlpack(reader.get_batch(numbers).to_dlpack())


def torchcodec_frames(mp4: bytes, numbers: np.ndarray) -> Tensor:
    """As directly as torchcodec gives them."""
    from torchcodec.decoders import VideoDecoder

    return VideoDecoder(mp4, dimension_order="NHWC", num_ffmpeg_threads=1).get_frames_at(numbers.tolist()).data


def path_ratio(root: Path, decoder: DecoderName, direct: Callable[[bytes, np.ndarray], Tensor], rounds: int) -> float:
    """CPU-seconds from a shard to a ClipBatch of 256 frames of 224 x 224 over those of decoding the same frames."""
    shards = open_shards(root)
    # Every second stored frame, as the THUMOS recipes take them.
    clips = ClipConfig(windowing=Slide(256, frames_per_second=FPS / 2), workers=0)
    stream = stream_clips(shards, clips, batch_size=1, training=True, decoder=decoder)
    mp4, ratios = read_content(shards, shards.videos[0]), []
    for epoch in range(rounds):
        start = time.process_time()
        (batch,) = stream.epoch(epoch)
        ours = time.process_time() - start
        numbers = round(batch.timelines[0].to_seconds(0.0) * FPS) + 2 * np.arange(256)
        assert batch.valid.all()
        del batch
        start = time.process_time()
        frames = direct(mp4, numbers)
        ratios.append(ours / (time.process_time() - start))
        del frames
    return statistics.median(ratios)


def loader_wait(root: Path, steps: int) -> float:
    """Share of its time that a consumer waits for 2 workers, where it needs as long for a clip as one of them."""
    clips = ClipConfig(windowing=Slide(64, frames_per_second=FPS), workers=2, size=112)
    alone = stream_clips(open_shards(root), replace(clips, workers=0), batch_size=1, training=True)
    start = time.perf_counter()
    for epoch in range(steps // 4):
        list(alone.epoch(epoch))
    busy = (time.perf_counter() - start) / (steps // 4)
    many = replace(open_shards(root), videos=(open_shards(root).videos[0],) * steps)
    stream = stream_clips(many, clips, batch_size=1, training=True)
    batches = stream.epoch(0)
    next(batches)
    waited, start = 0.0, time.perf_counter()
    for _ in range(steps - 1):
        time.sleep(busy)
        asked = time.perf_counter()
        next(batches)
        waited += time.perf_counter() - asked
    return waited / (time.perf_counter() - start)


def private_mib() -> float:
    """Memory that this process alone has, pages of files that it could share with others left out."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Anonymous:")) / 1024


def used_mib() -> float:
    """`private_mib` without what malloc keeps for later: that differs by 5 MiB from one moment to the next."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return private_mib()


def leak(root: Path, count: int) -> float:
    """Growth of memory from the first tenth of the clips to the end."""
    clips = ClipConfig(windowing=Slide(16, frames_per_second=FPS), workers=0, size=64)
    stream = stream_clips(open_shards(root), clips, batch_size=1, training=True)
    for epoch in range(count):
        for _ in stream.epoch(epoch):
            pass
        if epoch == count // 10:
            before = used_mib()
    return used_mib() / before - 1


def write_million(root: Path, count: int, per_shard: int = 64) -> Path:
    """An index of so many videos, in tars that are holes."""
    root.mkdir()
    entries, shards = [], []
    for first in range(0, count, per_shard):
        name = f"shard-{first // per_shard:06d}.tar"
        for number in range(first, min(first + per_shard, count)):
            actions = tuple(Action(float(k), k + 0.5, "x") for k in range(2))
            record = VideoRecord(f"video_{number:09d}", "training", 60.0, actions)
            entries.append(IndexedVideo(record, name, (number - first) * 1024, 1024, 900, 15.0, 340, 256, number))
        with (root / name).open("wb") as file:
            file.truncate(per_shard * 1024)
        shards.append(ShardFile(name, per_shard * 1024, "0" * 64, min(per_shard, count - first)))
    write_folder(root, entries, shards)
    return root


def measure_open(root: Path, result) -> None:
    """In a process of its own: open the folder, then make an order."""
    gc.collect()
    before, start = private_mib(), time.perf_counter()
    shards = open_shards(root)
    opened, grown = time.perf_counter() - start, private_mib() - before
    before, start = private_mib(), time.perf_counter()
    order = training_order(columns_of(shards.videos)["shard"], shuffle_span=ClipConfig().shuffle_span, seed=0, epoch=0)
    result.put((opened, grown, time.perf_counter() - start, private_mib() - before, len(order)))


def main() -> None:
    """Measure, print and store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    minutes, clips, videos = (10, 1000, 100_000) if options.quick else (60, 10_000, 1_000_000)
    torch.set_num_threads(1)  # as in a worker of the loader; more spin while they wait, which counts as time
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        short, long = write_video(Path(scratch) / "short", 60), write_video(Path(scratch) / "long", minutes * 60)
        pairs = [(window_seconds(long, 140), window_seconds(short, 14)) for _ in range(5)]
        found["long_vs_short"] = statistics.median(a / b for a, b in pairs)
        found["leak"] = leak(short, clips)
        full = write_video(Path(scratch) / "full", 60, height=256, width=340)
        found["path_vs_decord"] = path_ratio(full, "decord", decord_frames, 9)
        if importlib.util.find_spec("torchcodec"):
            found["path_vs_torchcodec"] = path_ratio(full, "torchcodec", torchcodec_frames, 9)
        found["loader_wait"] = loader_wait(full, 60)
        million = write_million(Path(scratch) / "million", videos)
        open_shards(million)
        context = multiprocessing.get_context("spawn")
        result = context.SimpleQueue()
        process = context.Process(target=measure_open, args=(million, result))
        process.start()
        opened, open_mib, order, order_mib, _ = result.get()
        process.join()
        found |= {"open_million_s": opened, "open_million_mib": open_mib}
        found |= {"order_million_s": order, "order_million_mib": order_mib}
    found["relabel_share"] = relabel.measure(quick=options.quick)["relabel_share"]
    found |= shuffle.measure(quick=options.quick)
    print(json.dumps(found, indent=2))
    options.json.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
