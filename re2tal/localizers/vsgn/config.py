"""What a VSGN is built from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from re2tal.options import COUNT, INSIDE, NOT_NEGATIVE, SHARE, check_ranges, option

Variant = Literal["opentad", "original"]


@dataclass(frozen=True)
class VSGNConfig:
    """What a VSGN looks like, learns and puts out; the defaults are OpenTAD's on THUMOS-14."""

    name: Literal["vsgn"] = "vsgn"
    """Which localizer this configures."""
    variant: Variant = "opentad"
    """Whose network and loss, where the public implementations differ. "original": levels are pooled over 2 steps, not
    3, convolutions of the anchor heads have biases, scores of starts and ends are stretched, not features, and losses
    are divided by the positives of the batch, not by a running mean. Weights of one do not fit the other."""
    channels: int = option(256, within=COUNT)
    """Channels of every level; a multiple of `num_groups`."""
    num_groups: int = option(32, within=COUNT)
    """Groups of the heads' group normalisation."""
    num_levels: int = option(5, within=COUNT)
    """Levels of the pyramid, each half as long as the one before."""
    first_stride: int = 4
    """Steps of the features per step of the finest level; even."""
    num_neighbours: int | None = option(10, within=COUNT)
    """Nearest steps in the encoder's graph convolutions; None encodes by plain convolutions."""
    num_head_convs: int = option(4, within=NOT_NEGATIVE)
    """Convolutions in each anchor head before the one that predicts."""
    anchor_scales: tuple[float, ...] = (1.0, 1.5)
    """Lengths of the anchors at each position, in strides of their level."""
    anchor_iou: float = option(0.5, within=SHARE)
    """From this IoU with an action on, an anchor, or what it decodes to, must predict it."""
    boundary_iou: float = option(0.7, within=SHARE)
    """From this IoU with an action on, a decoded segment learns to move its boundaries."""
    focal_alpha: float = option(0.35, within=SHARE)
    """Weight of positives in the focal loss, which is used when there is a single class."""
    evaluation_weight: float = option(1.0, within=NOT_NEGATIVE)
    """Weight of the loss of starts, ends and insides of actions; the original's is 0.2."""
    initial_positives: int = option(100, within=COUNT)
    """Losses are divided by running means of the numbers of positives per batch; this is their first value."""
    positives_momentum: float = option(0.9, within=SHARE)
    """Share of the running means that each training step keeps."""
    stitch_below: float | None = option(None, within=INSIDE)
    """A clip with at most this share of real steps is stitched to a magnified copy of itself (the paper: 0.4); None
    never. `data.clips.windowing.short_share` cuts such clips from long videos."""
    stitch_gap: int = option(30, within=NOT_NEGATIVE)
    """Empty steps between the clip and its copy."""
    class_agnostic: bool = False
    """Find actions of the given classes without telling the classes apart; a video classifier may name them later."""
    candidate_min_score: float = option(0.001, within=SHARE)
    """Predictions below go no further; not applied to a single class."""
    candidate_top_k: int = option(2000, within=COUNT)
    """Predictions per clip that go further; all of them with a single class."""

    def __post_init__(self) -> None:
        if self.variant not in get_args(Variant):
            raise ValueError(f"unknown variant {self.variant!r}; known: {list(get_args(Variant))}")
        check_ranges(self, "localizer")
        if not self.anchor_scales or min(self.anchor_scales) <= 0:
            raise ValueError(f"localizer.anchor_scales is {self.anchor_scales}; give positive numbers, at least one")
        if self.channels % self.num_groups:
            raise ValueError(f"channels={self.channels} must be a multiple of num_groups={self.num_groups}")
        if self.first_stride < 2 or self.first_stride % 2:
            raise ValueError(f"first_stride={self.first_stride} must be even: the first level halves the stem's output")

    @property
    def strides(self) -> tuple[int, ...]:
        """Steps of the features per step of each level, finest first."""
        return tuple(self.first_stride * 2**level for level in range(self.num_levels))
