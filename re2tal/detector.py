"""The detector: a backbone, resampling to the localizer's grid, then the localizer.

    frames (B, 3, T, H, W) -> backbone (B, C, T') -> linear resampling (B, C, num_steps) -> localizer -> Outputs

One step of the localizer's grid lasts T / num_steps frames; step 0 starts where frame 0 starts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from re2tal.backbones.base import VideoBackbone
from re2tal.localizers.base import Localizer
from re2tal.structures import Action, Detections, Features, Timeline


class TemporalActionDetector(nn.Module):
    """Backbone and localizer as one module: call it for `Outputs`, then `loss` or `detect` on what it returned."""

    def __init__(self, backbone: VideoBackbone, localizer: Localizer, *, num_steps: int) -> None:
        super().__init__()
        if localizer.in_channels != backbone.out_channels:
            raise ValueError(
                f"localizer expects {localizer.in_channels} channels, backbone {type(backbone).__name__} gives "
                f"{backbone.out_channels}; build it with in_channels=backbone.out_channels"
            )
        self.backbone = backbone
        self.localizer = localizer
        self.num_steps = num_steps

    @property
    def classes(self) -> tuple[str, ...]:
        """The localizer's."""
        return self.localizer.classes

    def forward(self, frames: Tensor, frame_mask: Tensor) -> tuple:
        """(B, 3, T, H, W) normalised float frames, (B, T) bool -> the localizer's named tuple of tensors.

        Without a network in the place of the backbone, (B, C, T) features take that of the frames.
        """
        return self.localizer(resample(self.backbone(frames, frame_mask), num_steps=self.num_steps))

    def loss(
        self, outputs: tuple, actions: Sequence[Sequence[Action]], timelines: Sequence[Timeline], *, num_frames: int
    ) -> dict[str, Tensor]:
        """Named losses; `timelines` count frames, `num_frames` is T."""
        return self.localizer.loss(outputs, actions, self._step_timelines(timelines, num_frames))

    def detect(self, outputs: tuple, timelines: Sequence[Timeline], *, num_frames: int) -> list[Detections]:
        """One Detections per clip, in seconds, before suppression; `timelines` count frames, `num_frames` is T."""
        return self.localizer.detect(outputs, self._step_timelines(timelines, num_frames))

    def _step_timelines(self, timelines: Sequence[Timeline], num_frames: int) -> list[Timeline]:
        return [timeline.coarsen(num_frames / self.num_steps) for timeline in timelines]


def resample(features: Features, *, num_steps: int) -> Features:
    """Linear interpolation in time to `num_steps` (as Re2TAL: sample centres, no aligned corners); mask by nearest."""
    if features.values.shape[-1] == num_steps:
        return features
    values = F.interpolate(features.values, size=num_steps, mode="linear", align_corners=False)
    mask = F.interpolate(features.mask[:, None].to(values.dtype), size=num_steps, mode="nearest")[:, 0] > 0.5
    return Features(values, mask)
