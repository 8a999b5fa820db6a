import gc
import itertools
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from data.files import write_video
from data.folders import indexed, write_shards
from data.numbered import encode_numbered, read_numbers
from data.workers import ready_worker

from re2tal.data.contract.members import read_content, read_video
from re2tal.data.contract.shards import ShardSet
from re2tal.data.contract.verify import damage
from re2tal.data.streaming import readers, workers
from re2tal.data.streaming import stream as stream_module
from re2tal.data.streaming.decode import DecodeError, decode_frames
from re2tal.data.streaming.stream import ClipConfig, ClipStream, stream_clips
from re2tal.data.streaming.transforms import Box, crop_and_resize
from re2tal.data.streaming.windows import ResizeWhole, Slide, Trimmed, plan_windows
from re2tal.data.streaming.workers import STOP_SIGNALS, stop_signals_blocked
from re2tal.structures import Action, ClipBatch

LENGTHS = (40, 61, 100, 150, 33, 90, 75)
SLIDE = Slide(32, frames_per_second=15, overlap=0.5)
PLAIN = ClipConfig(windowing=SLIDE, size=48, fit="stretch", crop_area=(1, 1), flip=False, workers=0)


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> ShardSet:
    videos = {
        f"v{number}": (encode_numbered(length), indexed(length, actions=[Action(0.2, 0.9, "x")]))
        for number, length in enumerate(LENGTHS)
    }
    return write_shards(tmp_path_factory.mktemp("stream") / "training", videos, per_shard=3)


def damaged(shards: ShardSet, *video_ids: str) -> ShardSet:
    """The same folder, but the index names another checksum for these videos, as if their bytes had changed."""
    videos = [
        replace(video, crc32=video.crc32 ^ 1) if video.record.video_id in video_ids else video
        for video in shards.videos
    ]
    return replace(shards, videos=tuple(videos))


def same(one: ClipBatch, other: ClipBatch) -> bool:
    tensors = all(torch.equal(getattr(one, n), getattr(other, n)) for n in ("frames", "frame_mask", "valid"))
    values = ("actions", "timelines", "video_ids", "window_ids")
    return tensors and all(getattr(one, name) == getattr(other, name) for name in values)


def numbers(batch: ClipBatch, clip: int) -> list[int]:
    return read_numbers(batch.frames[clip].permute(1, 2, 3, 0).numpy())


def evaluate(shards: ShardSet, config: ClipConfig = PLAIN, **options) -> ClipStream:
    return stream_clips(shards, config, training=False, **{"batch_size": 3, **options})


def train(shards: ShardSet, config: ClipConfig = PLAIN, **options) -> ClipStream:
    return stream_clips(shards, config, training=True, **{"batch_size": 2, **options})


@pytest.mark.parametrize("windowing", [SLIDE, Slide(20, frames_per_second=8), ResizeWhole(64)])
def test_every_frame_of_a_clip_is_the_one_the_plan_and_the_timeline_say(shards, windowing):
    stream = evaluate(shards, replace(PLAIN, windowing=windowing))
    seen = 0
    for batch in stream.epoch(0):
        assert batch.frames.shape == (3, 3, windowing.num_frames, 48, 48)
        assert batch.frames.dtype == torch.uint8
        for clip in np.flatnonzero(batch.valid.numpy()):
            window = plan_windows(shards.by_id[batch.video_ids[clip]], windowing)[batch.window_ids[clip]]
            assert numbers(batch, clip) == window.indices.tolist()
            # The number in a picture, over 30 a second, is the time at which the stored video shows it: at most half
            # a stored frame from the timeline for windows, half a stretch for whole videos (whose centres are taken).
            times = [batch.timelines[clip].to_seconds(t) for t in range(window.num_valid)]
            slack = 0.5 / 30 + (batch.timelines[clip].seconds_per_step / 2 if windowing == ResizeWhole(64) else 0)
            assert np.abs(np.array(times) - window.indices[: window.num_valid] / 30).max() <= slack + 1e-9
            seen += 1
    assert seen == sum(len(plan_windows(video, windowing)) for video in shards.videos)


def test_a_short_video_is_padded_with_its_last_frame_and_masked(shards):
    batch = next(iter(evaluate(shards).epoch(0)))
    assert batch.video_ids[0] == "v0"  # 40 frames at 30 a second are 20 at 15
    assert batch.frame_mask[0].tolist() == [True] * 20 + [False] * 12
    assert numbers(batch, 0) == [*range(0, 40, 2), *[38] * 12]


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("make", [train, evaluate])
def test_the_number_of_workers_changes_nothing(shards, make, workers):
    config = replace(PLAIN, flip=True, crop_area=(0.3, 1.0), augmentation="opentad", workers=workers, prefetch=1)
    wanted = [batch for epoch in range(2) for batch in make(shards, replace(config, workers=0)).epoch(epoch)]
    stream = make(shards, config)
    got = [batch for epoch in range(2) for batch in stream.epoch(epoch)]
    assert len(got) == len(wanted) == 2 * stream.steps_per_epoch
    assert all(same(*pair) for pair in zip(got, wanted, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_is_entered_at_any_step(shards, workers):
    stream = train(shards, replace(PLAIN, flip=True, augmentation="opentad", workers=workers), batch_size=1)
    whole = list(stream.epoch(5))
    assert len(whole) == stream.steps_per_epoch == 7
    for start_step in (0, 1, 4, 6, 7):
        rest = list(stream.epoch(5, start_step))
        assert len(rest) == 7 - start_step
        assert all(same(*pair) for pair in zip(rest, whole[start_step:], strict=True))


def test_an_epoch_that_was_left_early_does_not_leak_into_the_next(shards):
    stream = train(shards, replace(PLAIN, workers=2), batch_size=1)
    wanted = list(stream.epoch(1))
    next(iter(stream.epoch(0)))
    assert all(same(*pair) for pair in zip(stream.epoch(1), wanted, strict=True))


def test_epochs_differ_in_order_and_windows(shards):
    stream = train(shards, batch_size=1)
    first, second = ({b.video_ids[0]: b for b in stream.epoch(epoch)} for epoch in (0, 1))
    assert set(first) == set(second)
    assert list(first) != list(second)
    assert any(first[name].timelines != second[name].timelines for name in first)


def test_ranks_make_equally_many_steps_and_share_the_videos_out(shards):
    streams = [train(shards, batch_size=1, rank=rank, world_size=3) for rank in range(3)]
    assert {stream.steps_per_epoch for stream in streams} == {2}
    names = [batch.video_ids[0] for stream in streams for batch in stream.epoch(0)]
    assert len(set(names)) == 6


def test_a_clip_is_augmented_alike_on_every_number_of_ranks_and_in_evaluation_never(shards):
    config = replace(PLAIN, flip=True, crop_area=(0.3, 1.0), augmentation="opentad")
    alone = [batch.frames[0] for batch in train(shards, config, batch_size=1).epoch(4)]
    streams = [train(shards, config, batch_size=1, rank=rank, world_size=3).epoch(4) for rank in range(3)]
    shared = [batch.frames[0] for batches in zip(*streams, strict=True) for batch in batches]
    assert all(torch.equal(*pair) for pair in zip(shared, alone, strict=False))
    plain = [batch.frames[0] for batch in train(shards, replace(config, augmentation="none"), batch_size=1).epoch(4)]
    assert not any(torch.equal(*pair) for pair in zip(plain, alone, strict=True))
    assert all(same(*pair) for pair in zip(evaluate(shards, config).epoch(0), evaluate(shards).epoch(0), strict=True))


def test_the_global_generator_is_left_alone(shards):
    before = torch.random.get_rng_state()
    stream = train(shards, replace(PLAIN, flip=True, workers=1))
    assert len(list(stream.epoch(0))) == 3
    assert torch.equal(torch.random.get_rng_state(), before)


def test_crops_and_mirroring_are_one_choice_per_clip(shards):
    config = replace(PLAIN, flip=True, crop_area=(0.2, 0.3), windowing=ResizeWhole(8))
    still = {"s": (encode_numbered(2), indexed(2))}
    folder = write_shards(shards.root.parent / "still" / "training", still, per_shard=1)
    pictures = []
    for epoch in range(12):
        (batch,) = train(folder, config, batch_size=1).epoch(epoch)
        first_half, second_half = batch.frames[0, :, :4], batch.frames[0, :, 4:]  # frames 0 and 1, four times each
        assert torch.equal(first_half, first_half[:, :1].expand_as(first_half))
        assert torch.equal(second_half, second_half[:, :1].expand_as(second_half))
        pictures.append(second_half[:, 0])
    assert any(not torch.equal(pictures[0], picture) for picture in pictures[1:])


def send(number: signal.Signals, pid: int) -> None:
    """From another process than this one, which is the workers' parent. Gives the worker the time to look at it."""
    subprocess.run(["kill", f"-{number.value}", str(pid)], check=True)
    deadline = time.monotonic() + 30
    while is_pending(number, pid):
        assert time.monotonic() < deadline, f"nobody looks at signals of process {pid}"
        time.sleep(0.01)


def is_pending(number: signal.Signals, pid: int) -> bool:
    (mask,) = [line.split()[1] for line in Path(f"/proc/{pid}/status").read_text().splitlines() if "ShdPnd" in line]
    return bool(int(mask, 16) >> (number - 1) & 1)


class Waiting:
    """Garbage whose end waits for ever in another process than its own, as that of an FFmpeg scaler does."""

    def __init__(self) -> None:
        self.circle, self.process = self, os.getpid()

    def __del__(self) -> None:
        while os.getpid() != self.process:
            time.sleep(1)


@pytest.mark.timeout(60)
def test_a_worker_does_not_collect_garbage_of_its_parent(shards, monkeypatch):
    def collect_first(worker: int) -> None:
        workers.start_worker(worker)
        gc.collect()

    monkeypatch.setattr(stream_module, "start_worker", collect_first)
    stream = train(shards, replace(PLAIN, workers=1))
    gc.disable()
    try:
        Waiting()
        assert len(list(stream.epoch(0))) == stream.steps_per_epoch
    finally:
        gc.enable()


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_a_worker_outlives_stop_signals_except_its_parents(context):
    ours, theirs = multiprocessing.get_context(context).Pipe()
    worker = multiprocessing.get_context(context).Process(target=ready_worker, args=(theirs,), daemon=True)
    with stop_signals_blocked():
        worker.start()
    try:
        assert ours.recv() == "ready"
        for number in STOP_SIGNALS:
            send(number, worker.pid)
            ours.send("still there?")
            assert ours.recv() == "still there?"
    finally:
        worker.terminate()  # as DataLoader and multiprocessing end theirs
        worker.join(30)
    assert worker.exitcode == 0


def test_a_stop_signal_to_every_process_leaves_the_batches_as_they_are(shards):
    before = set(multiprocessing.active_children())
    stream = train(shards, replace(PLAIN, workers=2, prefetch=1), batch_size=1)
    wanted = list(train(shards, batch_size=1).epoch(0))
    batches = stream.epoch(0)
    got = [next(batches)]
    workers = set(multiprocessing.active_children()) - before
    assert len(workers) == 2
    for worker, number in itertools.product(workers, STOP_SIGNALS):
        send(number, worker.pid)
    got += batches
    assert all(same(*pair) for pair in zip(got, wanted, strict=True))
    assert all(worker.is_alive() for worker in workers)
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & set(STOP_SIGNALS)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_video_is_replaced_reported_and_does_not_change_the_number_of_steps(shards, workers, caplog):
    config = replace(PLAIN, workers=workers)
    wanted = list(train(shards, config, batch_size=1).epoch(0))
    stream = train(damaged(shards, "v3"), config, batch_size=1)
    got = list(stream.epoch(0))
    assert len(got) == len(wanted) == stream.steps_per_epoch
    for batch, intact in zip(got, wanted, strict=True):
        if batch.video_ids == ("v3",):
            assert not batch.valid.any()
            assert batch.actions == ((),)
            assert not batch.frames.any()
        else:
            assert same(batch, intact)
    assert list(stream.failures) == ["v3"]
    assert stream.failures["v3"].shard == "shard-000001.tar"
    assert "checksum of v3.mp4" in stream.failures["v3"].reason
    assert "v3 in shard-000001.tar is left out" in caplog.text


def test_many_damaged_videos_end_training(shards):
    stream = train(damaged(shards, *(f"v{number}" for number in range(6))), batch_size=1)
    with pytest.raises(ValueError, match=r"6 clips of epoch 0 cannot be read from .* more than 5: v\d in shard-"):
        list(stream.epoch(0))


def test_one_damaged_video_ends_evaluation_unless_allowed(shards):
    broken = damaged(shards, "v4")
    with pytest.raises(ValueError, match=r"1 clips of epoch 0 cannot be read .* v4 in shard-000001.tar: .* verify"):
        list(evaluate(broken).epoch(0))
    batches = list(evaluate(broken, replace(PLAIN, allow_missing=True)).epoch(0))
    missing = {name for batch in batches for name, ok in zip(batch.video_ids, batch.valid, strict=True) if not ok}
    assert "v4" in missing


def flip_bit(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda tar: flip_bit(tar, 2000), r"the checksum of a\.mp4 is not the one in the index"),
        (lambda tar: flip_bit(tar, 0), r"damaged at byte 0"),
        (lambda tar: flip_bit(tar, 1030), r"damaged at byte 0: no readable tar header for a\.mp4"),
        (lambda tar: bytes(len(tar)), r"damaged at byte 0: no readable tar header for a\.json"),
        (lambda tar: tar[:2000], r"damaged at byte 0"),
    ],
    ids=["video", "first header", "second header", "zeros", "cut"],
)
def test_a_change_inside_a_shard_is_noticed(tmp_path, damage, message):
    folder = write_shards(tmp_path / "training", {"a": (encode_numbered(40), indexed(40))}, per_shard=1)
    path = folder.path("shard-000000.tar")
    assert read_content(folder, folder.videos[0])[4:8] == b"ftyp"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DecodeError, match=message):
        read_content(folder, folder.videos[0])


def test_a_folder_of_another_program_with_pictures_in_another_order_is_refused(tmp_path):
    """MPEG-4 with B-frames: decord gives 62 of 64 of its frames wrong, without a word."""
    mp4 = write_video(tmp_path / "a.mp4", num_frames=64, codec="mpeg4", options={"bf": "2", "g": "12"}).read_bytes()
    folder = write_shards(tmp_path / "training", {f"v{n}": (mp4, indexed(64)) for n in range(6)}, per_shard=3)
    with pytest.raises(ValueError, match=r"v0 in shard-000000\.tar: .* its codec is 'mp4v'"):
        list(evaluate(folder).epoch(0))
    with pytest.raises(ValueError, match=r"6 clips of epoch 0 .* its codec is 'mp4v'"):
        list(train(folder, batch_size=1).epoch(0))
    folder = write_shards(tmp_path / "own", {"a": (encode_numbered(64, fps=25), indexed(64))}, per_shard=1)
    with pytest.raises(ValueError, match=r"at 25 a second, the index says .* at 30: index and video disagree"):
        list(evaluate(folder).epoch(0))


def test_a_sparse_member_is_refused_by_its_header(tmp_path):
    """512 bytes that say they are a gigabyte of zeros."""
    folder = write_shards(tmp_path / "training", {"a": (bytes(512), indexed(40))}, per_shard=1)
    sparse = tarfile.TarInfo("a.mp4")
    sparse.type, sparse.size = tarfile.GNUTYPE_SPARSE, 512
    header = bytearray(sparse.tobuf(tarfile.GNU_FORMAT))
    header[386:410], header[483:495] = b"00000000000\x0000000001000\x00", b"10000000000\x00"
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    path = folder.path("shard-000000.tar")
    path.write_bytes(path.read_bytes()[:1024] + header + path.read_bytes()[1536:])
    with tarfile.open(path) as tar:
        assert tar.getmembers()[1].size == 2**30
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"member 'a\.mp4' of type b'S' where the plain file a\.mp4 should be"):
        list(evaluate(folder).epoch(0))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10


class Deadly(readers.FrameReader):
    """Ends or stops the process at one video."""

    number: int

    def read(self, number, window, generator, *, into):
        if number == 3 and multiprocessing.parent_process() is not None:
            os.kill(os.getpid(), self.number)
        super().read(number, window, generator, into=into)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGSTOP])
def test_a_worker_that_dies_or_stops_is_replaced_and_its_clip_left_out(shards, number, caplog):
    wanted = list(train(shards, batch_size=2).epoch(0))
    # Only a stopped one is found by its silence. On a busy machine a sound one is silent for seconds too.
    silent = 10 if number == signal.SIGSTOP else 120
    stream = train(shards, replace(PLAIN, workers=2, timeout_seconds=silent), batch_size=2)
    reader = stream._batches.reader
    deadly = Deadly(shards, reader.size, reader.fit, reader.crop_area, reader.crop_aspect, reader.flip)
    object.__setattr__(deadly, "number", number)
    stream._batches.reader = deadly
    got = list(stream.epoch(0))
    assert len(got) == len(wanted)
    for batch, intact in zip(got, wanted, strict=True):
        for clip, video_id in enumerate(intact.video_ids):
            assert batch.video_ids[clip] == video_id
            assert bool(batch.valid[clip]) == (video_id != "v3")
            assert video_id == "v3" or torch.equal(batch.frames[clip], intact.frames[clip])
    assert list(stream.failures) == ["v3"]
    assert "v3 in shard-000001.tar is left out: the worker that read it died" in caplog.text


def test_an_idle_worker_that_is_killed_costs_no_clip(shards):
    wanted = [batch for epoch in (0, 1) for batch in train(shards, batch_size=1).epoch(epoch)]
    stream = train(shards, replace(PLAIN, workers=2, prefetch=1), batch_size=1)
    got = list(stream.epoch(0))
    stream._loader.workers[1].kill()
    got += stream.epoch(1)
    assert all(same(*pair) for pair in zip(got, wanted, strict=True))
    assert not stream.failures


def test_a_stopped_worker_does_not_keep_the_process_alive(shards):
    script = f"""
import os, signal
from re2tal.data.contract.shards import open_shards
from re2tal.data.streaming.stream import ClipConfig, stream_clips
if __name__ == "__main__":
    stream = stream_clips(open_shards({str(shards.root)!r}), ClipConfig(workers=2), batch_size=1, training=True)
    next(stream.epoch(0))
    for worker in stream._loader.workers:
        os.kill(worker.pid, signal.SIGSTOP)
"""
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == 0


def test_a_video_is_read_once_for_windows_that_follow_each_other(shards, monkeypatch):
    read = []
    monkeypatch.setattr(readers, "read_video", lambda folder, video: read.append(video) or read_video(folder, video))
    wanted = list(evaluate(shards).epoch(0))
    assert [video.record.video_id for video in read] == [f"v{number}" for number in range(len(LENGTHS))]
    assert sum(len(batch.video_ids) for batch in wanted) > 2 * len(read)
    monkeypatch.setattr(readers, "MAX_OPEN_BYTES", 0)
    assert all(same(*pair) for pair in zip(evaluate(shards).epoch(0), wanted, strict=True))
    stream = evaluate(shards)
    reader = stream._batches.reader
    for number in (0, 1, 2):
        reader.opened.open(shards, number)
    assert list(reader.opened._videos) == [2]


def test_memory_is_flat_over_many_clips(shards):
    stream, sizes = train(shards, batch_size=7), []
    for epoch in range(60):
        for _ in stream.epoch(epoch):
            pass
        sizes.append(int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize())
    assert max(sizes[30:]) - max(sizes[:30]) < 4 << 20


def test_another_video_at_the_offset_is_noticed(shards):
    video = replace(shards.videos[1], offset=0, num_bytes=shards.videos[0].num_bytes)
    with pytest.raises(DecodeError, match=r"at byte 0: member 'v0\.json' .* where the plain file v1\.json should be"):
        read_content(shards, video)


def test_more_clips_in_a_step_than_videos_is_refused(shards):
    with pytest.raises(
        ValueError,
        match=r"training: 7 videos are too few for one step of 4 ranks x batch_size 2 .* lower engine\.batch_size",
    ):
        train(shards, rank=0, world_size=4)


def test_an_index_that_promises_more_frames_than_the_video_has_ends_the_run(shards):
    videos = tuple(replace(video, num_frames=video.num_frames * 3) for video in shards.videos)
    with pytest.raises(ValueError, match="index and video disagree"):
        list(evaluate(replace(shards, videos=videos)).epoch(0))


def test_a_start_step_outside_the_epoch_is_refused(shards):
    with pytest.raises(ValueError, match="start_step is 4; an epoch has steps 0 to 2"):
        next(iter(train(shards).epoch(0, 4)))


def test_too_little_shared_memory_is_said_before_workers_die_of_it(shards, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 1 << 20})())
    with pytest.raises(
        ValueError, match=r"/dev/shm has 1 MiB free, 2 workers .* need 55 MiB; enlarge .* lower data\.clips\.workers"
    ):
        train(shards, replace(PLAIN, workers=2, size=224))
    with pytest.raises(ValueError, match=r"2 workers of each of 4 ranks on this host .* need 220 MiB"):
        train(shards, replace(PLAIN, workers=2, size=224), ranks_on_host=4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 0}, r"data\.clips\.size is 0; give 1 or more"),
        ({"workers": -1}, r"data\.clips\.workers is -1"),
        ({"crop_area": (0.5, 1.5)}, r"data\.clips\.crop_area is"),
        ({"crop_aspect": (2.0, 1.0)}, r"data\.clips\.crop_aspect is"),
    ],
)
def test_settings_without_a_meaning_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(PLAIN, **change)


def test_three_crops_show_three_squares_of_the_same_frames(shards):
    windowing = Trimmed(8, frames_per_second=15, num_views=2, num_crops=3)
    config = replace(PLAIN, windowing=windowing, fit="crop")
    (batch,) = itertools.islice(stream_clips(shards, config, batch_size=6, training=False).epoch(0), 1)
    assert batch.window_ids == (0, 1, 2, 3, 4, 5)
    frames = decode_numbered(shards, plan_windows(shards.videos[0], windowing)[0].indices)
    height, width = frames.shape[1:3]
    assert width > height
    for clip, left in enumerate((0, (width - height) // 2, width - height)):
        box = Box(0, left, height, height)
        assert torch.equal(batch.frames[clip], crop_and_resize(frames, box, size=config.size))
    with pytest.raises(ValueError, match=r"num_crops is 3, but data.clips.fit stretch shows the whole picture"):
        replace(PLAIN, windowing=windowing)


def decode_numbered(shards: ShardSet, indices: np.ndarray) -> torch.Tensor:
    return decode_frames(read_content(shards, shards.videos[0]), indices)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_is_deleted_while_it_is_streamed_costs_its_clips(tmp_path, workers, caplog):
    videos = {f"v{n}": (encode_numbered(40), indexed(40)) for n in range(8)}
    folder = write_shards(tmp_path / "training", videos, per_shard=4)
    folder.path("shard-000001.tar").unlink()
    config = replace(PLAIN, windowing=Slide(16), workers=workers)
    stream = evaluate(folder, replace(config, allow_missing=True), batch_size=1)
    valid = {name for batch in stream.epoch(0) for name, ok in zip(batch.video_ids, batch.valid, strict=True) if ok}
    assert valid == {"v0", "v1", "v2", "v3"}
    assert sorted(stream.failures) == ["v4", "v5", "v6", "v7"]
    assert all("shard-000001.tar cannot be read: " in failure.reason for failure in stream.failures.values())
    assert "v4 in shard-000001.tar is left out" in caplog.text
    with pytest.raises(ValueError, match=r"1 clips of epoch 0 cannot be read .* v4 in shard-000001.tar"):
        list(evaluate(folder, config, batch_size=1).epoch(0))
    assert f"{folder.path('shard-000001.tar')} cannot be read: " in "\n".join(damage(folder))
