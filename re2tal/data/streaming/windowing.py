"""How videos are cut into clips.

    ResizeWhole   the whole video at a fixed number of frames          |. . . . . . . . . . .|
    Slide         windows at a fixed rate, the last one flush          |........|
                  with the video's end                                      |........|
                                                                              |........|
    Trimmed       views of a video that shows one action from end to end

The window lengths and the rules for cut actions are those of the published Re2TAL recipes; views and crops those of
Video Swin and SlowFast on Kinetics.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from re2tal.options import COUNT, POSITIVE, Range, check_ranges

_PART = "data.clips.windowing"
_SHARE = Range(lambda value: 0 <= value <= 1, "a share from 0 to 1")
# Whatever else is given, something is to be seen in a clip.
_SHARE_LEFT = Range(lambda value: 0.01 <= value <= 1, "a share from 0.01 to 1")
_OVERLAP = Range(lambda value: 0 <= value < 1, "a share from 0 to below 1")


@dataclass(frozen=True)
class ResizeWhole:
    """The whole video as one clip: `num_frames` frames from the centres of as many equal stretches."""

    num_frames: int = 768
    """frames of a clip"""
    shortest_action: float = 0.01
    """in training, actions shorter than this share of the video are left out"""

    def __post_init__(self) -> None:
        check_ranges(self, _PART, num_frames=COUNT, shortest_action=_SHARE)


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
        check_ranges(self, _PART, num_frames=COUNT, short_share=_SHARE, short_length=_SHARE_LEFT, kept_share=_SHARE)
        check_ranges(self, _PART, shortest_crop=_SHARE_LEFT, overlap=_OVERLAP)
        check_ranges(self, _PART, frames_per_second=POSITIVE, frame_stride=COUNT)
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
        check_ranges(self, _PART, num_frames=COUNT, num_views=COUNT, frames_per_second=POSITIVE)
        if self.num_crops not in (1, 3):
            raise ValueError(f"data.clips.windowing.num_crops is {self.num_crops}; give 1 or 3")


Windowing = ResizeWhole | Slide | Trimmed
