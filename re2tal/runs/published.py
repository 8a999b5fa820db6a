"""Published scores that `re2tal reproduce` compares with, and the recipes that stand for their settings.

Sources: Re2TAL (Zhao et al., CVPR 2023), abstract, for SlowFast-101; the same paper as quoted in tables 8 and 9 of
ViT-TAD (CVPR 2024), for Video Swin-T; OpenTAD's result tables (configs/re2tal), whose settings the recipes have.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Target = Literal["thumos14", "activitynet"]
BackboneFamily = Literal["slowfast", "swin"]
AVERAGE = "average"


@dataclass(frozen=True, slots=True)
class PublishedScore:
    """A score as it was printed."""

    source: str
    tiou: str
    """The temporal IoU, as reports call it, or AVERAGE over all."""
    percent: float


@dataclass(frozen=True, slots=True)
class Published:
    """What was published for a data set and a backbone."""

    dataset: Target
    recipe: str
    clips_per_step: int
    """Clips of all ranks together in an optimizer step."""
    scores: tuple[PublishedScore, ...]
    """The paper's first."""
    needs_video_classes: bool = False
    """The detector finds actions without naming them: the scores are with a video classifier's classes."""


PAPER, QUOTED, OPENTAD = "Re2TAL, abstract", "Re2TAL, as quoted by ViT-TAD", "OpenTAD, same settings"

PUBLISHED: Mapping[tuple[Target, BackboneFamily], Published] = {
    ("thumos14", "slowfast"): Published(
        "thumos14",
        "thumos14_re2slowfast_r101",
        2,
        (
            PublishedScore(PAPER, "0.5", 64.9),
            PublishedScore(OPENTAD, "0.5", 74.27),
            PublishedScore(OPENTAD, AVERAGE, 70.19),
        ),
    ),
    ("thumos14", "swin"): Published(
        "thumos14",
        "thumos14_re2swin_tiny",
        2,
        (
            PublishedScore(QUOTED, "0.5", 62.4),
            PublishedScore(OPENTAD, "0.5", 70.06),
            PublishedScore(OPENTAD, AVERAGE, 66.89),
        ),
    ),
    ("activitynet", "slowfast"): Published(
        "activitynet",
        "activitynet_re2slowfast_r101",
        8,
        (PublishedScore(PAPER, AVERAGE, 37.01), PublishedScore(OPENTAD, AVERAGE, 37.55)),
        needs_video_classes=True,
    ),
    ("activitynet", "swin"): Published(
        "activitynet",
        "activitynet_re2swin_tiny",
        8,
        (PublishedScore(QUOTED, AVERAGE, 36.80), PublishedScore(OPENTAD, AVERAGE, 36.47)),
        needs_video_classes=True,
    ),
}
