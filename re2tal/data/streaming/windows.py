"""Which frames of a stored video make a clip, and their times: arithmetic only, no video is read.

    ResizeWhole   the whole video at a fixed number of frames          |. . . . . . . . . . .|
    Slide         windows at a fixed rate, the last one flush          |........|
                  with the video's end                                      |........|
                                                                              |........|

Stored frame i shows the video at i / fps seconds: shards are written so. `plan_windows` covers a video for evaluation,
`draw_window` draws one window of it for training. The window lengths and the rules for cut actions are those of the
published Re2TAL recipes; views and crops those of Video Swin and SlowFast on Kinetics. Steps of stored features are cut
by the same rules, and are called frames here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np

from re2tal.structures import Action, Timeline, VideoRecord

MAX_TRIES = 200
"""How often a window that shows no action is drawn again. A video may have none, or only actions too long for it."""


@dataclass(frozen=True)
class ResizeWhole:
    """The whole video as one clip: `num_frames` frames from the centres of as many equal stretches."""

    num_frames: int = 768
    """frames of a clip"""
    shortest_action: float = 0.01
    """in training, actions shorter than this share of the video are left out"""

    def __post_init__(self) -> None:
        _check_count("data.clips.windowing.num_frames", self.num_frames)
        _check_share("data.clips.windowing.shortest_action", self.shortest_action, least=0.0)


@dataclass(frozen=True)
class Slide:
    """Clips of a fixed length in time, at a fixed rate."""

    num_frames: int = 1024
    """frames of a clip; a shorter video is padded"""
    frames_per_second: float | None = 15.0
    """rate at which frames are taken; at most the rate of the stored video, and None is that rate"""
    frame_stride: int = 1
    """with frames_per_second None: one of so many stored frames is taken, as OpenTAD does with videos of any rate (keep
    theirs with `re2tal shards build --copy`)"""
    overlap: float = 0.5
    """in evaluation, share of a window that the next one sees again"""
    kept_share: float = 0.75
    """an action belongs to a window that shows at least this share of it"""
    shortest_crop: float = 0.9
    """in training, a video shorter than a window is cut to a random share between this and 1"""
    short_share: float = 0.0
    """for localizers that magnify short clips (localizer.stitch_below): in training, this share of the windows shows
    `short_length` of a window; above 0, evaluation looks at such short windows too"""
    short_length: float = 0.38
    """length of a short window, as a share of a whole one; the rest is padding"""

    def __post_init__(self) -> None:
        _check_count("data.clips.windowing.num_frames", self.num_frames)
        _check_share("data.clips.windowing.short_share", self.short_share, least=0.0)
        _check_share("data.clips.windowing.short_length", self.short_length, least=0.01)
        _check_share("data.clips.windowing.kept_share", self.kept_share, least=0.0)
        _check_share("data.clips.windowing.shortest_crop", self.shortest_crop, least=0.01)
        if not 0 <= self.overlap < 1:
            raise ValueError(f"data.clips.windowing.overlap is {self.overlap}; give a share from 0 to below 1")
        _check_rate(self.frames_per_second)
        _check_count("data.clips.windowing.frame_stride", self.frame_stride)
        if self.frame_stride > 1 and self.frames_per_second is not None:
            raise ValueError(
                f"data.clips.windowing.frame_stride is {self.frame_stride}, but frames_per_second is "
                f"{self.frames_per_second:g}, which says already what is taken; set that to null (None on the command "
                "line), or frame_stride to 1"
            )

    @property
    def short_frames(self) -> int:
        """Frames of a short window that are not padding."""
        return max(1, round(self.num_frames * self.short_length))


@dataclass(frozen=True)
class Trimmed:
    """Clips of a fixed length in time from a video that shows one action from end to end. Where the video is shorter,
    it starts again, as mmaction2 does it."""

    num_frames: int = 32
    """frames of a clip"""
    frames_per_second: float = 15.0
    """rate at which frames are taken, such as every second one of 30; at most the rate of the stored video"""
    num_views: int = 4
    """in evaluation, clips spread evenly over the video (Video Swin: 4, SlowFast: 10); in training it is one"""
    num_crops: Literal[1, 3] = 1
    """in evaluation, squares that are cut from each of them: the middle, or both ends of the longer side too"""

    def __post_init__(self) -> None:
        _check_count("data.clips.windowing.num_frames", self.num_frames)
        _check_count("data.clips.windowing.num_views", self.num_views)
        _check_rate(self.frames_per_second)
        if self.num_crops not in (1, 3):
            raise ValueError(f"data.clips.windowing.num_crops is {self.num_crops}; give 1 or 3")


Windowing = ResizeWhole | Slide | Trimmed


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


@dataclass(frozen=True, slots=True, eq=False)
class Window:
    """One clip to be read."""

    window_id: int
    """counts the windows of one video in evaluation; 0 in training"""
    positions: np.ndarray
    """(T,) float64, in stored frames, in order, inside the video; padding repeats the last valid one, and a trimmed
    video starts again"""
    num_valid: int
    """the first so many of the T frames are not padding"""
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
        if total <= count:
            count = max(1, round(total * generator.uniform(windowing.shortest_crop, 1)))
        start = int(generator.integers(total - count, endpoint=True))
        window = _cut(video, windowing, window_id=0, start=start, count=count)
        if window.actions or not video.record.actions:
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
        if last > first and last - first >= kept_share * (action.end_seconds - action.start_seconds):
            inside.append(replace(action, start_seconds=first, end_seconds=last))
    return tuple(inside)


def _slides(
    video: Stored, windowing: Slide, *, multiple: int = 1, length: int | None = None, first_id: int = 0
) -> list[Window]:
    """The windows that cover a video; their first samples are multiples of `multiple`."""
    total, length = _num_samples(video, windowing), length or windowing.num_frames
    step = max(1, round(length * (1 - windowing.overlap) / multiple)) * multiple
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
    return int((video.num_samples - 1) / video.samples_per_second * rate + 1e-6) + 1


def _rate(video: Stored, windowing: Slide | Trimmed) -> float:
    """Frames of a clip in a second of the video."""
    stride = windowing.frame_stride if isinstance(windowing, Slide) else 1
    return windowing.frames_per_second or video.samples_per_second / stride


def _inside(video: Stored, positions: np.ndarray) -> np.ndarray:
    return np.clip(positions, 0, video.num_samples - 1)


def _check_count(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} is {value}; give 1 or more")


def _check_rate(value: float | None) -> None:
    if value is not None and not 0 < value < float("inf"):
        raise ValueError(f"data.clips.windowing.frames_per_second is {value}; give a positive number")


def _check_share(name: str, value: float, *, least: float) -> None:
    if not least <= value <= 1:
        raise ValueError(f"{name} is {value}; give a share from {least:g} to 1")
