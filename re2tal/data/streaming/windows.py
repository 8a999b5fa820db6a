"""Which frames make a clip, known from a video's description before any video is read; windowing.py has the kinds.

Stored frame i shows the video at i / fps seconds: shards are written so. `plan_windows` covers a video for evaluation,
`draw_window` draws one window of it for training. Steps of stored features are cut by the same rules, and are called
frames here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from re2tal.data.streaming.windowing import ResizeWhole, Slide, Trimmed, Windowing
from re2tal.structures import Action, Timeline, VideoRecord

MAX_TRIES = 200
"""How often a window that shows no action is drawn again. A video may have none, or only actions too long for it."""


class Stored(Protocol):
    """A video as it is stored: frames, or steps of features, at equal distances.

    Sample i is the stretch of time from start_seconds + i / samples_per_second on, 1 / samples_per_second long.
    """

    @property
    def record(self) -> VideoRecord:
        """What its annotations say."""

    @property
    def num_samples(self) -> int:
        """How many samples are stored."""

    @property
    def samples_per_second(self) -> float:
        """How many of them make a second."""

    @property
    def start_seconds(self) -> float:
        """Where sample 0 begins."""


# Not compared by value: an array's == is not one bool.
@dataclass(frozen=True, slots=True, eq=False)
class Window:
    """One clip to be read."""

    window_id: int
    """counts the windows of one video in evaluation; 0 in training"""
    positions: np.ndarray
    """(T,) float64, in stored frames, in order, inside the video; padding repeats the last valid one, and a trimmed
    video starts again"""
    num_valid: int
    """how many of the T frames, from the first, are not padding"""
    timeline: Timeline
    """counts frames: frame t of the clip lies at timeline.to_seconds(t)"""
    actions: tuple[Action, ...]
    """what the clip shows, cut to it (of a trimmed video: whole), in seconds of the whole video"""
    crop: float = 0.5
    """in evaluation, where along the longer side the square is cut out, from 0 to 1"""

    @property
    def indices(self) -> np.ndarray:
        """(T,) int64: the stored frames nearest to the positions."""
        return np.rint(self.positions).astype(np.int64)

    @property
    def mask(self) -> np.ndarray:
        """(T,) bool."""
        return np.arange(len(self.indices)) < self.num_valid


def plan_windows(video: Stored, windowing: Windowing) -> list[Window]:
    """The windows that cover a video, in order, for evaluation."""
    match windowing:
        case ResizeWhole():
            return [_whole(video, windowing.num_frames, video.record.actions)]
        case Slide():
            windows = _slides(video, windowing)
            return windows if not windowing.short_share else [*windows, *_short_slides(video, windowing, len(windows))]
        case Trimmed(num_crops=num_crops):
            # The middle, or the three crops by which Video Swin and SlowFast are evaluated on Kinetics.
            crops = (0.5,) if num_crops == 1 else (0.0, 0.5, 1.0)
            places = [(s, crop) for s in _views(_num_samples(video, windowing), windowing) for crop in crops]
            return [_loop(video, windowing, window_id=n, start=s, crop=crop) for n, (s, crop) in enumerate(places)]


def cover_windows(video: Stored, windowing: Windowing, *, frames_per_step: int) -> list[Window]:
    """As `plan_windows`, but every window begins with a step of `frames_per_step` frames on one grid for the video.

    For computing features of whole videos. The last window may be padded by less than a step. Raises ValueError where
    a window does not hold whole steps.
    """
    if windowing.num_frames % frames_per_step:
        raise ValueError(
            f"windows of {windowing.num_frames} frames do not hold whole steps of {frames_per_step} frames; "
            f"give {windowing.num_frames // frames_per_step * frames_per_step or frames_per_step}"
        )
    if isinstance(windowing, Slide):
        return _slides(video, windowing, multiple=frames_per_step)
    return plan_windows(video, windowing)


def draw_window(video: Stored, windowing: Windowing, *, generator: np.random.Generator) -> Window:
    """One window for training: the whole video, or a random stretch that shows an action if that can be."""
    match windowing:
        case ResizeWhole(num_frames, shortest_action):
            shortest_seconds = shortest_action * video.record.duration_seconds
            # As the published recipes train on ActivityNet. Evaluation keeps them: it is measured on all.
            actions = [a for a in video.record.actions if a.end_seconds - a.start_seconds >= shortest_seconds]
            return _whole(video, num_frames, actions)
        case Slide():
            return _truncate(video, windowing, generator=generator)
        case Trimmed(num_frames=num_frames):
            latest = max(_num_samples(video, windowing) - num_frames, 0)
            return _loop(video, windowing, window_id=0, start=int(generator.integers(latest, endpoint=True)), crop=0.5)


def _truncate(video: Stored, windowing: Slide, *, generator: np.random.Generator) -> Window:
    total, longest = _num_samples(video, windowing), windowing.num_frames
    # Nothing is drawn without short windows, so that runs with and without them see the same others.
    if windowing.short_share and generator.uniform() < windowing.short_share:
        longest = windowing.short_frames
    for _ in range(MAX_TRIES):
        count = longest
        # A video that fits has no random stretch of full length: a shorter one is taken, so that it is varied too.
        if total <= count:
            count = max(1, round(total * generator.uniform(windowing.shortest_crop, 1)))
        start = int(generator.integers(total - count, endpoint=True))
        window = _cut(video, windowing, window_id=0, start=start, count=count)
        if window.actions or not video.record.actions:
            # After the last try a window of background is taken: each video gives one clip an epoch, whatever it shows.
            break
    return window


def _whole(video: Stored, num_frames: int, actions: Sequence[Action]) -> Window:
    stride = video.num_samples / num_frames
    return Window(
        window_id=0,
        # Centres of equal stretches. A range with a fractional step would give one too many for some lengths.
        positions=_inside(video, (np.arange(num_frames) + 0.5) * stride - 0.5),
        num_valid=num_frames,
        timeline=Timeline(video.start_seconds, stride / video.samples_per_second, video.record.duration_seconds),
        actions=tuple(actions),
    )


def _cut(video: Stored, windowing: Slide, *, window_id: int, start: int, count: int) -> Window:
    """`count` samples from number `start` on, padded to the window's length."""
    rate = _rate(video, windowing)
    samples = start + np.minimum(np.arange(windowing.num_frames), count - 1)
    start_seconds, end_seconds = (video.start_seconds + sample / rate for sample in (start, start + count))
    return Window(
        window_id=window_id,
        positions=_inside(video, samples * (video.samples_per_second / rate)),
        num_valid=count,
        timeline=Timeline(start_seconds, 1 / rate, video.record.duration_seconds),
        actions=_actions_inside(video.record.actions, start_seconds, end_seconds, kept_share=windowing.kept_share),
    )


def _loop(video: Stored, windowing: Trimmed, *, window_id: int, start: int, crop: float) -> Window:
    """Samples from number `start` on; after the last one comes the first again."""
    seconds_per_frame = 1 / windowing.frames_per_second
    samples = (start + np.arange(windowing.num_frames)) % _num_samples(video, windowing)
    return Window(
        window_id=window_id,
        positions=_inside(video, samples * (video.samples_per_second / windowing.frames_per_second)),
        num_valid=windowing.num_frames,
        # Time does not start again where the video does: of a trimmed video only the class is asked for.
        timeline=Timeline(start * seconds_per_frame, seconds_per_frame, video.record.duration_seconds),
        actions=video.record.actions,
        crop=crop,
    )


def _views(total: int, windowing: Trimmed) -> list[int]:
    """First samples of the views of `total` samples, from the start to the end, or in the middle where it is one.

    A video that is hardly longer than a clip has fewer of them.
    """
    latest = max(total - windowing.num_frames, 0)
    shares = np.linspace(0, 1, windowing.num_views) if windowing.num_views > 1 else np.array([0.5])
    return sorted({int(start) for start in np.rint(shares * latest)})


def _actions_inside(
    actions: Sequence[Action], start_seconds: float, end_seconds: float, *, kept_share: float
) -> tuple[Action, ...]:
    """Actions of which at least `kept_share` lies in a stretch of time, cut to it."""
    inside = []
    for action in actions:
        first, last = max(action.start_seconds, start_seconds), min(action.end_seconds, end_seconds)
        # `last > first` too, because with a kept_share of 0 an action that only touches the stretch would come out
        # empty.
        if last > first and last - first >= kept_share * (action.end_seconds - action.start_seconds):
            inside.append(replace(action, start_seconds=first, end_seconds=last))
    return tuple(inside)


def _slides(
    video: Stored, windowing: Slide, *, multiple: int = 1, length: int | None = None, first_id: int = 0
) -> list[Window]:
    """The windows that cover a video; their first samples are multiples of `multiple`."""
    total, length = _num_samples(video, windowing), length or windowing.num_frames
    # At least one step: an overlap close to 1 would else never move on.
    step = max(1, round(length * (1 - windowing.overlap) / multiple)) * multiple
    # The last window reaches the end of the video, so it may overlap more than was asked for.
    last = max(0, -(-(total - length) // multiple) * multiple)
    return [
        _cut(video, windowing, window_id=n, start=start, count=min(length, total - start))
        for n, start in enumerate([*range(0, last, step), last], first_id)
    ]


def _short_slides(video: Stored, windowing: Slide, first_id: int) -> list[Window]:
    """The short windows that cover a video; none where it is no longer than one, which the whole window shows."""
    if _num_samples(video, windowing) <= windowing.short_frames:
        return []
    return _slides(video, windowing, length=windowing.short_frames, first_id=first_id)


def _num_samples(video: Stored, windowing: Slide | Trimmed) -> int:
    """How many frames a video has at the window's rate."""
    rate = _rate(video, windowing)
    # Rates written with three digits, 29.97 for 30000/1001, are the same rate.
    if rate > video.samples_per_second * 1.001:
        raise ValueError(
            f"data.clips.windowing.frames_per_second is {rate}, but {video.record.video_id} is stored at "
            f"{video.samples_per_second:g} frames per second; lower it, or build the shards at a higher rate"
        )
    # As many as lie at or before the last stored one; the millionth is for rounding, as in 29.999999.
    return int((video.num_samples - 1) / video.samples_per_second * rate + 1e-6) + 1


def _rate(video: Stored, windowing: Slide | Trimmed) -> float:
    """Frames of a clip in a second of the video."""
    stride = windowing.frame_stride if isinstance(windowing, Slide) else 1
    return windowing.frames_per_second or video.samples_per_second / stride


def _inside(video: Stored, positions: np.ndarray) -> np.ndarray:
    # Where a resized video has fewer frames than the clip, the outer centres lie before its first frame or behind its
    # last one.
    return np.clip(positions, 0, video.num_samples - 1)
