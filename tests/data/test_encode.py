from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from data.files import cut_without_decoding, encoding, flip_bytes, write_video
from data.numbered import encode, numbered_frame, read_numbers

from re2tal.data.building.check import Normalised, check_normalised, small, spread
from re2tal.data.building.encode import normalise_video, sampling_grid
from re2tal.data.building.pictures import nearest_in_time, stored_size
from re2tal.data.building.probe import probe_video
from re2tal.data.streaming.decode import decode_frames

CHANGING_RATE = [33 * i for i in range(30)] + [1000 + 100 * i for i in range(30)]
SOURCES = {
    "plain": lambda p: write_video(p / "v.mp4"),
    "24 per second": lambda p: write_video(p / "v.mp4", rate=24),
    "ntsc": lambda p: write_video(p / "v.mp4", rate=Fraction(30000, 1001)),
    "variable rate": lambda p: write_video(p / "v.mp4", milliseconds=CHANGING_RATE),
    "milliseconds": lambda p: write_video(p / "v.mkv"),
    "open groups": lambda p: write_video(p / "v.mp4", options={"g": "30", "x264-params": "open-gop=1:bframes=3"}),
    "hevc": lambda p: write_video(p / "v.mp4", codec="libx265", options={"x265-params": "log-level=none"}),
    "vp9": lambda p: write_video(p / "v.webm", codec="libvpx-vp9", options={"deadline": "realtime", "cpu-used": "8"}),
    "mpeg-4 with B-frames": lambda p: write_video(p / "v.avi", codec="mpeg4", options={"bf": "2"}),
    "transport stream": lambda p: write_video(p / "v.ts"),
    "fragmented": lambda p: write_video(p / "v.mp4", container_options={"movflags": "frag_keyframe+empty_moov"}),
    "late start": lambda p: write_video(p / "v.mp4", start=45),
    "ten bits": lambda p: write_video(p / "v.mp4", pix_fmt="yuv420p10le"),
    "full chroma": lambda p: write_video(p / "v.mp4", pix_fmt="yuv444p"),
    "with sound": lambda p: write_video(p / "v.mp4", sound=True),
    "one frame": lambda p: write_video(p / "v.mp4", num_frames=1),
}


def source_seconds(path: Path) -> list[float]:
    """When each frame is shown, by FFmpeg's decoder."""
    with av.open(str(path)) as container:
        times = [float(frame.pts * frame.time_base) for frame in container.decode(video=0)]
    return [time - times[0] for time in times]


def normalised(source: Path, target: Path, **options) -> tuple[bytes, Normalised]:
    result = normalise_video(source, target, probe=probe_video(source), encoding=encoding(**options))
    return target.read_bytes(), result


@pytest.mark.parametrize("options", [{"fps": 15}, {"fps": 30}, {"num_frames": 23}], ids=str)
@pytest.mark.parametrize("kind", SOURCES)
def test_every_stored_frame_is_the_source_frame_nearest_to_its_time(tmp_path, kind, options):
    source = SOURCES[kind](tmp_path)
    video, result = normalised(source, tmp_path / "out.mp4", **options)
    check_normalised(tmp_path / "out.mp4", result)
    assert result.damage.num_damaged == 0
    shown = np.array(read_numbers(decode_frames(video, range(result.num_frames)).numpy()))
    times = np.array(source_seconds(source))
    distance = np.abs(times[None] - np.arange(result.num_frames)[:, None] / result.fps)
    # Two source frames may be as near as rounding allows.
    assert np.all(distance[np.arange(len(shown)), shown] <= distance.min(axis=1) + 1e-4)


def test_a_cut_that_was_not_decoded_starts_at_its_first_visible_frame(tmp_path):
    source = write_video(tmp_path / "whole.mp4", num_frames=300, options={"g": "250"})
    cut = cut_without_decoding(source, tmp_path / "cut.mp4", start_seconds=4)
    video, result = normalised(cut, tmp_path / "out.mp4", fps=30)
    assert result.damage.num_damaged == 0
    assert read_numbers(decode_frames(video, range(result.num_frames)).numpy()) == list(range(120, 300))


@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_a_rotated_video_is_stored_upright(tmp_path, rotation):
    source = write_video(tmp_path / "v.mp4", rotation=rotation)
    video, _ = normalised(source, tmp_path / "out.mp4")
    upright = decode_frames(video, range(60)).numpy()
    # The numbers were painted before the turn; turning back by hand makes them readable.
    painted = np.rot90(upright, -rotation // 90, axes=(1, 2))
    assert upright.shape[1:3] == ((64, 50) if rotation % 180 else (48, 64))
    assert read_numbers(painted) == list(range(60))


def test_exactly_so_many_frames_span_the_whole_video(tmp_path):
    source = write_video(tmp_path / "v.mp4", num_frames=90, rate=25)
    video, result = normalised(source, tmp_path / "out.mp4", num_frames=32)
    assert result.num_frames == 32
    assert result.num_frames / result.fps == pytest.approx(3.6, abs=1e-5)
    assert read_numbers(decode_frames(video, [0, 31]).numpy()) == [0, 87]


def test_the_stored_file_has_closed_groups_of_64_and_nothing_but_pictures(tmp_path):
    source = write_video(tmp_path / "v.mp4", num_frames=200, sound=True)
    normalised(source, tmp_path / "out.mp4")
    with av.open(str(tmp_path / "out.mp4")) as container:
        assert [stream.type for stream in container.streams] == ["video"]
        packets = [packet for packet in container.demux(video=0) if packet.size]
    step = packets[0].duration
    keys = [packet.pts for packet in packets if packet.is_keyframe]
    for key in keys:
        sent_after = packets[[packet.pts for packet in packets].index(key) :]
        assert all(packet.pts >= key for packet in sent_after), "a picture is shown before the key frame it follows"
    assert keys == [0, 64 * step, 128 * step, 192 * step]


def test_the_same_video_gives_the_same_bytes(tmp_path):
    source = write_video(tmp_path / "v.mp4", rotation=270, num_frames=120)
    first, _ = normalised(source, tmp_path / "first.mp4")
    for number in range(5):
        clutter = [np.full(int(size), number + 1, np.uint8) for size in (3e4, 2e5, 1e6)]
        again, _ = normalised(source, tmp_path / "again.mp4")
        del clutter
        assert again == first


def test_damage_in_the_pictures_is_found(tmp_path):
    whole = write_video(tmp_path / "whole.mp4", num_frames=300, container_options={"movflags": "faststart"})
    damaged = flip_bytes(whole, tmp_path / "v.mp4")
    with pytest.raises(ValueError, match=r"v\.mp4 is damaged"):
        normalised(damaged, tmp_path / "out.mp4")


def test_a_target_that_cannot_be_written_is_not_the_videos_fault(tmp_path):
    source = write_video(tmp_path / "v.mp4")
    with pytest.raises(OSError, match=r"out\.mp4 cannot be written"):
        normalise_video(source, tmp_path / "nowhere" / "out.mp4", probe=probe_video(source), encoding=encoding())


def test_the_check_finds_a_file_with_open_groups(tmp_path):
    path = write_video(
        tmp_path / "v.mp4", num_frames=300, options={"g": "30", "x264-params": "open-gop=1:bframes=3:scenecut=0"}
    )
    samples = {number: small(numbered_frame(number)) for number in spread(300)}
    with pytest.raises(ValueError, match=r"groups of pictures are open"):
        check_normalised(path, Normalised(300, 30.0, 64, 48, samples=samples))


def test_the_check_finds_wrong_counts_and_times(tmp_path):
    path = write_video(tmp_path / "v.mp4")
    with pytest.raises(ValueError, match="60 frames stored, 61 encoded"):
        check_normalised(path, Normalised(num_frames=61, fps=30.0, width=64, height=48))
    with pytest.raises(ValueError, match="away from its time"):
        check_normalised(path, Normalised(num_frames=60, fps=29.0, width=64, height=48))


def test_nearest_in_time_by_hand():
    timed = [(Fraction(0), "a"), (Fraction(4, 10), "b"), (Fraction(5, 10), "c"), (Fraction(2), "d")]
    # 0: a; 0.25: b; 0.5: c; 0.75, 1, 1.25 (as near to c as to d): c; 1.5, 1.75: d
    assert "".join(nearest_in_time(iter(timed), rate=Fraction(4), num_frames=8)) == "abccccdd"
    paused = [(Fraction(0), "a"), (Fraction(3), "b")]
    assert "".join(nearest_in_time(iter(paused), rate=Fraction(1), num_frames=5)) == "aaabb"
    assert "".join(nearest_in_time(iter([(Fraction(0), "a")]), rate=Fraction(4), num_frames=3)) == "aaa"
    assert list(nearest_in_time(iter([]), rate=Fraction(4), num_frames=3)) == []


def test_sampling_grid_by_hand():
    assert sampling_grid(Fraction(1001, 500), encoding(fps=30)) == (Fraction(30), 60)
    assert sampling_grid(Fraction(1, 100), encoding(fps=30)) == (Fraction(30), 1)
    assert sampling_grid(Fraction(120), encoding(num_frames=768)) == (Fraction(32, 5), 768)


@pytest.mark.parametrize(
    ("displayed", "stored"),
    [
        ((1280, 720), (456, 256)),
        ((720, 1280), (256, 456)),
        ((1281, 961), (342, 256)),
        ((100, 90), (100, 90)),
        ((81, 61), (80, 60)),
        ((48, 64), (50, 64)),
    ],
)
def test_the_short_side_is_256_unless_the_video_is_smaller(displayed, stored):
    assert stored_size(displayed, short_side=256) == stored


def test_a_picture_like_a_ribbon_is_refused():
    with pytest.raises(ValueError, match="4000x100 is longer than 8 times"):
        stored_size((4000, 100), short_side=256)


@pytest.mark.parametrize("width", [*range(6, 100, 2), 114, 144, 192])
def test_decord_takes_every_width_that_is_stored(tmp_path, width):
    stored_width, height = stored_size((width, 32), short_side=256)
    video = encode(np.full((3, height, stored_width, 3), 100, np.uint8))
    assert decode_frames(video, [0, 2]).shape == (2, height, stored_width, 3)
