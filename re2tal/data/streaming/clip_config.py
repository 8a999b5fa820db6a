"""ClipConfig: how videos become clips."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from re2tal.data.streaming.augmentation import AUGMENTATIONS, Augmentation
from re2tal.data.streaming.windowing import Slide, Trimmed, Windowing
from re2tal.options import COUNT, NOT_NEGATIVE, SHARE, check_ranges, option


@dataclass(frozen=True)
class ClipConfig:
    """How videos become clips. The settings of pictures have no effect on stored features."""

    windowing: Windowing = field(default_factory=Slide)
    """which frames make a clip"""
    size: int = 224
    """height and width of a clip, pixels"""
    fit: Literal["crop", "stretch"] = "crop"
    """how a whole picture becomes square: its middle is cut out, or it is squeezed"""
    crop_area: tuple[float, float] = (0.08, 1.0)
    """in training, least and largest share of the picture that a random crop shows; 1 1 for the whole picture"""
    crop_aspect: tuple[float, float] = (3 / 4, 4 / 3)
    """in training, narrowest and widest random crop, width over height"""
    flip: bool = True
    """in training, mirror every second clip; switch it off where left and right are different actions"""
    colour_jitter: float = 0.0
    """in training, strength of the random change of colours, 0 to 1; applied on the device"""
    augmentation: Augmentation = option("none", planned=False)
    """in training, what else happens to a clip's pixels: opentad draws two of ImgAug's fifteen operations, then
    mmaction2's ColorJitter, as OpenTAD's recipes do; none"""
    shuffle_span: int = 16384
    """in training, how many videos are shuffled together; more than there are: a plain shuffle. A smaller span reads a
    disk that is slow at random places nearer to one place, and its batches show more videos of one shard"""
    workers: int = option(2, resumable=True, planned=False)
    """processes per rank that read and decode; 0: the training process itself"""
    prefetch: int = option(2, resumable=True, planned=False)
    """batches that each worker keeps ready"""
    timeout_seconds: int = option(300, resumable=True, planned=False)
    """replace a worker that is silent for so long, and leave out its clip; 0: no limit"""
    allow_missing: bool = False
    """in evaluation, go on without videos that cannot be read; they then count as without detections"""

    def __post_init__(self) -> None:
        counts = {"size": COUNT, "shuffle_span": COUNT, "prefetch": COUNT}
        counts |= {"workers": NOT_NEGATIVE, "timeout_seconds": NOT_NEGATIVE}
        check_ranges(self, "data.clips", **counts, colour_jitter=SHARE)
        for name in ("crop_area", "crop_aspect"):
            least_share, most = getattr(self, name)
            if not 0 < least_share <= most or (name == "crop_area" and most > 1):
                raise ValueError(f"data.clips.{name} is {getattr(self, name)}; give two positive numbers, least first")
        if self.augmentation not in AUGMENTATIONS:
            raise ValueError(f"data.clips.augmentation is {self.augmentation!r}; known: {', '.join(AUGMENTATIONS)}")
        if self.fit == "stretch" and isinstance(self.windowing, Trimmed) and self.windowing.num_crops > 1:
            raise ValueError(
                f"data.clips.windowing.num_crops is {self.windowing.num_crops}, but data.clips.fit stretch shows the "
                "whole picture; give 1 crop, or fit crop"
            )
