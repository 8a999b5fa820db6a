"""What the configurations of all localizers on a pyramid have in common."""

from __future__ import annotations

import math
from dataclasses import dataclass

from re2tal.options import COUNT, INSIDE, NOT_NEGATIVE, POSITIVE, RATE, SHARE, check_ranges, option


@dataclass(frozen=True)
class PyramidConfig:
    """A pyramid of levels, each half as long as the one before, and heads that all levels share."""

    name: str = ""
    """Which localizer this configures."""
    channels: int = option(512, within=COUNT)
    """Channels of every level."""
    num_embedding_convs: int = option(2, within=NOT_NEGATIVE)
    """Convolutions before the first block of the encoder."""
    num_head_convs: int = option(2, within=NOT_NEGATIVE)
    """Convolutions in each head before the one that predicts."""
    head_channels: int | None = option(None, within=COUNT)
    """Channels inside the heads; None is as many as `channels`."""
    kernel_size: int = option(3, within=COUNT)
    """Of the embedding convolutions; odd."""
    regression_ranges: tuple[tuple[float, float], ...] = ((0, 4), (4, 8), (8, 16), (16, 32), (32, 64), (64, 10_000))
    """Per level, finest first: which distances to an action's farther end its points predict, in steps."""
    centre_radius: float = option(1.5, within=POSITIVE)
    """Only points this close to an action's centre learn it, in strides of their level."""
    label_smoothing: float = option(0.0, within=RATE)
    """Share of each class target that is spread evenly over the classes and background."""
    regression_weight: float = option(1.0, within=NOT_NEGATIVE)
    """Weight of the regression loss in the total."""
    initial_positives: int = option(100, within=COUNT)
    """Both losses are divided by a running mean of the number of positive points per batch; this is its first value."""
    positives_momentum: float = option(0.9, within=SHARE)
    """Share of the running mean that each training step keeps."""
    prior_probability: float = option(0.01, within=INSIDE)
    """Score of every class before training."""
    step_supervision: float = option(0.0, within=NOT_NEGATIVE)
    """Weight of an auxiliary loss in which a linear layer names the actions at every step of the input features. For
    backbones that start from random weights; a pretrained one does without."""
    class_agnostic: bool = False
    """Find actions of the given classes without telling the classes apart; a video classifier may name them later."""
    candidate_min_score: float = option(0.001, within=SHARE)
    """Predictions below go no further; OpenTAD does not apply it to a single class."""
    candidate_top_k: int = option(2000, within=COUNT)
    """Predictions that go further, per clip; all of them with a single class."""

    def __post_init__(self) -> None:
        check_ranges(self, "localizer")
        if not self.regression_ranges:
            raise ValueError("localizer.regression_ranges is empty; give (low, high) for each level, finest first")
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={self.kernel_size} must be odd, or sequences change their length")
        if self.num_head_convs == 0 and self.head_width != self.channels:
            raise ValueError(
                f"head_channels={self.head_channels} needs num_head_convs of 1 or more; without, heads read the "
                f"{self.channels} channels of the levels"
            )
        if any(low >= high for low, high in self.regression_ranges):
            raise ValueError(f"regression_ranges={self.regression_ranges} must each be (low, high) with low < high")

    @property
    def num_levels(self) -> int:
        """Levels of the pyramid."""
        return len(self.regression_ranges)

    @property
    def head_width(self) -> int:
        """Channels inside the heads."""
        return self.head_channels or self.channels

    def padded_steps(self, num_steps: int) -> int:
        """To which length a clip of `num_steps` is padded."""
        return num_steps


@dataclass(frozen=True)
class PaddedPyramidConfig(PyramidConfig):
    """A pyramid over clips that are padded first, so that a clip's numbers do not depend on its batch."""

    position_encoding: bool = False
    """Add a sinusoid of the position after the embedding."""
    max_num_steps: int = option(512, within=COUNT)
    """Shorter clips are padded to this length; longer ones to a multiple of what the coarsest windows cover. The
    position encoding is defined on it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_num_steps % 2 ** (self.num_levels - 1):
            raise ValueError(
                f"max_num_steps={self.max_num_steps} must be a multiple of {2 ** (self.num_levels - 1)}, the stride of "
                f"the coarsest of {self.num_levels} levels"
            )

    @property
    def step_multiple(self) -> int:
        """Clips longer than `max_num_steps` are padded to a multiple of this."""
        return 2 ** (self.num_levels - 1)

    def padded_steps(self, num_steps: int) -> int:
        """To which length a clip of `num_steps` is padded."""
        # All short clips at one length: the numbers of a clip depend on the length it is padded to, for they did in
        # training.
        if num_steps <= self.max_num_steps:
            return self.max_num_steps
        return math.ceil(num_steps / self.step_multiple) * self.step_multiple
