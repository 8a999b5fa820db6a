"""The contract that every video backbone publishes, and the one way to build one.

A backbone maps normalised RGB frames to one feature vector per `frames_per_step` frames:

    (B, 3, T, H, W) float, (B, T) bool  ->  Features: (B, out_channels, T / frames_per_step) float and its mask
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from re2tal.structures import Features


class VideoBackbone(nn.Module, ABC):
    """A network that turns frames into a sequence of feature vectors."""

    out_channels: int
    frames_per_step: int

    @abstractmethod
    def forward(self, frames: Tensor, mask: Tensor) -> Features:
        """(B, 3, T, H, W) normalised float frames and their (B, T) bool mask -> Features (B, C, T')."""
