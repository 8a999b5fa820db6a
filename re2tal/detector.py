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
        values = resample(self.backbone(frames, frame_mask).values, num_steps=self.num_steps)
        return self.localizer(Features(values, grid_mask(frame_mask, num_steps=self.num_steps)))

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


def resample(values: Tensor, *, num_steps: int) -> Tensor:
    """(B, C, T') -> (B, C, num_steps): linear in time, as Re2TAL has it (sample centres, no aligned corners)."""
    if values.shape[-1] == num_steps:
        return values
    return F.interpolate(values, size=num_steps, mode="linear", align_corners=False)


def grid_mask(frame_mask: Tensor, *, num_steps: int) -> Tensor:
    """(B, T) bool over frames -> (B, num_steps): a step of the grid is valid where its first frame is, as in OpenTAD.

    Taken from the frames themselves. The backbone's steps may be coarser than the grid: through them, 77 valid frames
    of 96 would become 78 valid steps of 96.
    """
    if frame_mask.shape[-1] == num_steps:
        return frame_mask
    return F.interpolate(frame_mask[:, None].float(), size=num_steps, mode="nearest")[:, 0] > 0.5
