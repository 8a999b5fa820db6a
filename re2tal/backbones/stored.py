"""No network: features that were stored before pass through, for training localizers on them (`re2tal features`)."""

from __future__ import annotations

from torch import Tensor

from re2tal.backbones.base import BackboneConfig, VideoBackbone
from re2tal.structures import Features

NAME = "features"


class StoredFeatureInput(VideoBackbone):
    """The place of a backbone in a detector whose input is its output."""

    frames_per_step = 1

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.out_channels = channels

    def forward(self, frames: Tensor, mask: Tensor) -> Features:
        """(B, C, T) features in the place of frames, (B, T) bool -> the same. ValueError for other channels."""
        if frames.ndim != 3 or frames.shape[1] != self.out_channels:
            raise ValueError(
                f"this detector takes stored features of shape (B, {self.out_channels}, T), got {tuple(frames.shape)}"
            )
        return Features(frames, mask)


def build(config: BackboneConfig) -> StoredFeatureInput:
    """ValueError where the number of channels is missing, or the configuration describes a network too."""
    if config.feature_channels is None or config.feature_channels < 1:
        raise ValueError(
            f"backbone.feature_channels is {config.feature_channels}; give the number of channels of the features, as "
            "`re2tal shards list FEATURES/training` says it"
        )
    if config.clips_at_once is not None or config.trained_clips != 1:
        raise ValueError(
            f"backbone.name is {NAME!r}: there are no clips to encode; leave out backbone.clips_at_once and "
            "backbone.trained_clips"
        )
    if config.weights is not None or config.rewired:
        raise ValueError(
            f"backbone.name is {NAME!r}: there is no network to load weights into or to rewire; leave out "
            "backbone.weights, and set backbone.rewired to false"
        )
    if config.adapter != "none":
        raise ValueError(
            f"backbone.name is {NAME!r}: there is no network that adapters could train in; set backbone.adapter to "
            f"'none', it is {config.adapter!r}"
        )
    return StoredFeatureInput(config.feature_channels)
