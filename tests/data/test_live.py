"""Clips cut while a video comes in, against those planned and read from the same video as it is stored."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from data.files import write_video

from re2tal.data.building.encode import normalise_video, sampling_grid
from re2tal.data.building.pictures import pictures
from re2tal.data.building.probe import probe_video
from re2tal.data.contract.manifest import Encoding, FramesPerSecond, FramesPerVideo
from re2tal.data.streaming.decode import decode_frames
from re2tal.data.streaming.live import ENDLESS_SECONDS, live_clips, shaped
from re2tal.data.streaming.windows import ResizeWhole, Slide, plan_windows
from re2tal.structures import VideoRecord

RATE = 8.0


class Numbered:
    """A stored video of so many frames."""

    start_seconds = 0.0
    samples_per_second = RATE

    def __init__(self, num_frames: int) -> None:
        self.num_samples = num_frames
        self.record = VideoRecord("v", "validation", num_frames / RATE, ())


def numbered(num_frames: int, *, at_once: int) -> list[torch.Tensor]:
    """Frames of one pixel whose level is their number."""
    frames = torch.arange(num_frames, dtype=torch.uint8).view(1, -1, 1, 1).expand(3, -1, 1, 1)
    return list(frames.split(at_once, dim=1))


@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.3, 0.9])
@pytest.mark.parametrize("at_once", [1, 16])
@pytest.mark.parametrize("short_share", [0.0, 0.5])
def test_windows_are_those_of_the_plan_whatever_the_length(overlap: float, at_once: int, short_share: float) -> None:
    windowing = Slide(num_frames=10, frames_per_second=RATE, overlap=overlap, short_share=short_share, short_length=0.4)
    for num_frames in (1, 2, 4, 5, 9, 10, 11, 14, 15, 16, 20, 47, 101):
        video = Numbered(num_frames)
        clips = list(
            live_clips(
                numbered(num_frames, at_once=at_once),
                windowing,
                frames_per_second=RATE,
                duration_seconds=video.record.duration_seconds,
            )
        )
        planned = plan_windows(video, windowing)
        assert [clip.window_id for clip in clips] == [window.window_id for window in planned]
        # Short windows come among the others, as soon as their frames are there.
        clips.sort(key=lambda clip: -int(clip.mask.sum()))
        for clip, window in zip(clips, planned, strict=True):
            assert clip.content[0, :, 0, 0].tolist() == window.indices.tolist()
            assert clip.mask.tolist() == window.mask.tolist()
            assert clip.timeline == window.timeline


def test_a_stream_without_a_known_end_gives_the_same_windows_and_holds_no_more_than_one() -> None:
    windowing = Slide(num_frames=10, frames_per_second=RATE)
    clips = list(live_clips(iter(numbered(101, at_once=4)), windowing, frames_per_second=RATE))
    assert [clip.timeline.start_seconds for clip in clips] == [
        window.timeline.start_seconds for window in plan_windows(Numbered(101), windowing)
    ]
    assert {clip.timeline.duration_seconds for clip in clips[:-1]} == {ENDLESS_SECONDS}
    assert clips[-1].timeline.duration_seconds == 101 / RATE
    drawn = []

    def counted():
        for piece in numbered(101, at_once=1):
            drawn.append(1)
            yield piece

    for clip in live_clips(counted(), windowing, frames_per_second=RATE):
        assert len(drawn) <= clip.timeline.start_seconds * RATE + 11


def test_a_whole_video_needs_its_end() -> None:
    (clip,) = live_clips(
        numbered(12, at_once=5), ResizeWhole(num_frames=12), frames_per_second=RATE, duration_seconds=1.5
    )
    assert clip.content[0, :, 0, 0].tolist() == list(range(12))
    assert clip.timeline == plan_windows(Numbered(12), ResizeWhole(num_frames=12))[0].timeline
    with pytest.raises(ValueError, match=r"takes a video as a whole .* so it needs a video file"):
        list(live_clips(numbered(12, at_once=5), ResizeWhole(num_frames=12), frames_per_second=RATE))


@pytest.mark.parametrize("sampling", [FramesPerSecond(8.0), FramesPerVideo(24)])
def test_pictures_are_those_that_are_stored(tmp_path: Path, sampling: FramesPerSecond | FramesPerVideo) -> None:
    """But for what compression loses, here next to nothing; a picture that is one off differs by far more."""
    source = write_video(tmp_path / "v.mp4", rate=Fraction(30000, 1001))
    encoding, probe = Encoding(sampling, short_side=32, crf=1), probe_video(source)
    stored = normalise_video(source, tmp_path / "stored.mp4", probe=probe, encoding=encoding)
    kept = decode_frames((tmp_path / "stored.mp4").read_bytes(), range(stored.num_frames)).numpy()
    rate, num_frames = sampling_grid(probe.duration_seconds, encoding)
    shown = np.concatenate(
        list(pictures(source, probe=probe, rate=rate, num_frames=num_frames, short_side=encoding.short_side))
    )
    assert shown.shape == kept.shape
    differences = np.abs(shown.astype(int) - kept.astype(int)).mean(axis=(1, 2, 3))
    one_off = np.abs(shown[1:].astype(int) - kept[:-1].astype(int)).mean(axis=(1, 2, 3))
    assert differences.max() < min(2.5, one_off.min() / 2), (differences.max(), one_off.min())
    assert shaped(shown, size=16, fit="crop").shape == (3, num_frames, 16, 16)
