"""Published scores that `re2tal reproduce` compares with, and the recipes that stand for their settings.

Sources: Re2TAL (Zhao et al., CVPR 2023), abstract, for SlowFast-101; the same paper as quoted in tables 8 and 9 of
ViT-TAD (CVPR 2024), for Video Swin-T; OpenTAD's result tables (configs/re2tal), whose settings the recipes have.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from re2tal.config import RunConfig
from re2tal.recipes import find_recipe
from re2tal.recipes.about import PUBLISHED as AVERAGES

Target = Literal["thumos14", "activitynet"]
BackboneFamily = Literal["slowfast", "swin"]
AVERAGE = "average"
PAPER, QUOTED, OPENTAD = "Re2TAL, abstract", "Re2TAL, as quoted by ViT-TAD", "OpenTAD, same settings"


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
    scores: tuple[PublishedScore, ...]
    """The paper's first, OpenTAD's average last."""

    @classmethod
    def of(cls, dataset: Target, backbone: str, *scores: PublishedScore) -> Published:
        """With OpenTAD's average for the recipe."""
        recipe = f"{dataset}_{backbone}"
        return cls(dataset, recipe, (*scores, PublishedScore(OPENTAD, AVERAGE, float(AVERAGES[recipe][0]))))

    @property
    def clips_per_step(self) -> int:
        """Clips of all ranks together in an optimizer step."""
        return find_recipe(self.recipe).optimizer.made_for_clips or 1

    @property
    def needs_video_classes(self) -> bool:
        """The detector finds actions without naming them: the scores are with a video classifier's classes."""
        run = find_recipe(self.recipe)
        return isinstance(run, RunConfig) and run.localizer.class_agnostic


PUBLISHED: Mapping[tuple[Target, BackboneFamily], Published] = {
    ("thumos14", "slowfast"): Published.of(
        "thumos14", "re2slowfast_r101", PublishedScore(PAPER, "0.5", 64.9), PublishedScore(OPENTAD, "0.5", 74.27)
    ),
    ("thumos14", "swin"): Published.of(
        "thumos14", "re2swin_tiny", PublishedScore(QUOTED, "0.5", 62.4), PublishedScore(OPENTAD, "0.5", 70.06)
    ),
    ("activitynet", "slowfast"): Published.of("activitynet", "re2slowfast_r101", PublishedScore(PAPER, AVERAGE, 37.01)),
    ("activitynet", "swin"): Published.of("activitynet", "re2swin_tiny", PublishedScore(QUOTED, AVERAGE, 36.80)),
}
