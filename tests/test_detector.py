from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from re2tal.backbones.base import VideoBackbone
from re2tal.detector import TemporalActionDetector, resample
from re2tal.localizers.base import Localizer
from re2tal.structures import Action, Detections, Features, Timeline


class MeanColour(VideoBackbone):
    """One feature vector per two frames: the mean colour."""

    out_channels = 3
    frames_per_step = 2

    def forward(self, frames, mask):
        return Features(frames.mean(dim=(3, 4)).unfold(2, 2, 2).mean(-1), mask[:, ::2])


class FirstChannel(NamedTuple):
    signal: Tensor


class PeakLocalizer(Localizer[FirstChannel]):
    """Says that the action lasts one step, where the first channel is highest."""

    classes = ("peak",)
    in_channels = 3

    def class_rows(self):
        return {}

    def forward(self, features):
        return FirstChannel(features.values[:, 0])

    def loss(self, outputs, actions, timelines):
        steps = [timeline.to_steps(clip[0].start_seconds) for clip, timeline in zip(actions, timelines, strict=True)]
        return {"total": (outputs.signal.argmax(dim=1) - torch.tensor(steps)).abs().mean()}

    def detect(self, outputs, timelines):
        found = []
        for signal, timeline in zip(outputs.signal, timelines, strict=True):
            peak = signal.argmax().float()
            segment = timeline.to_seconds(torch.stack([peak, peak + 1]))[None]
            found.append(Detections(segment, signal.max()[None], torch.zeros(1, dtype=torch.int64)))
        return found


def test_seconds_survive_backbone_stride_and_resampling():
    # 16 frames at 4 per second from second 10; the backbone halves time, the grid has 8 steps: half a second a step.
    frames = torch.zeros(1, 3, 16, 2, 2)
    frames[:, :, 6:8] = 1.0
    detector = TemporalActionDetector(MeanColour(), PeakLocalizer(), num_steps=8)
    timelines = [Timeline(start_seconds=10.0, seconds_per_step=0.25, duration_seconds=60.0)]
    outputs = detector(frames, torch.ones(1, 16, dtype=torch.bool))
    (detections,) = detector.detect(outputs, timelines, num_frames=16)
    assert detections.segments.tolist() == [[11.5, 12.0]]
    assert detector.loss(outputs, [[Action(11.5, 12.0, "peak")]], timelines, num_frames=16)["total"] == 0


def test_resampling_to_fewer_steps_is_linear():
    halved = resample(torch.arange(8.0).view(1, 1, 8), num_steps=4)
    assert halved.flatten().tolist() == [0.5, 2.5, 4.5, 6.5]


@pytest.mark.parametrize(("num_steps", "valid_steps"), [(96, 77), (48, 39), (24, 20), (16, 13)])
def test_the_grid_is_as_long_as_its_frames_whatever_the_backbone_s_steps_are(num_steps, valid_steps):
    """77 of 96 frames: a step is valid where its first frame is, so as many as 77 frames begin."""

    class Masks(PeakLocalizer):
        def forward(self, features):
            assert features.values.shape[-1] == features.mask.shape[-1]
            return features.mask

    frame_mask = torch.arange(96)[None] < 77
    detector = TemporalActionDetector(MeanColour(), Masks(), num_steps=num_steps)
    mask = detector(torch.zeros(1, 3, 96, 2, 2), frame_mask)
    assert mask.tolist() == [[step < valid_steps for step in range(num_steps)]]


def test_a_localizer_built_for_another_backbone_is_refused():
    localizer = PeakLocalizer()
    localizer.in_channels = 5
    with pytest.raises(ValueError, match=r"localizer expects 5 channels, backbone MeanColour gives 3; build it with"):
        TemporalActionDetector(MeanColour(), localizer, num_steps=4)
