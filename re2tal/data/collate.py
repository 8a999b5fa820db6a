"""Clips to batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from re2tal.structures import Action, ClipBatch, Timeline


class Clip(NamedTuple):
    """One clip, cut to its final size but not normalised."""

    frames: Tensor
    """(3, T, H, W) uint8, RGB"""
    frame_mask: Tensor
    """(T,) bool"""
    actions: tuple[Action, ...]
    timeline: Timeline
    video_id: str
    window_id: int
    valid: bool


def collate(clips: Sequence[Clip]) -> ClipBatch:
    """Stack B clips of one size."""
    return ClipBatch(
        frames=torch.stack([clip.frames for clip in clips]),
        frame_mask=torch.stack([clip.frame_mask for clip in clips]),
        actions=tuple(clip.actions for clip in clips),
        timelines=tuple(clip.timeline for clip in clips),
        video_ids=tuple(clip.video_id for clip in clips),
        window_ids=tuple(clip.window_id for clip in clips),
        valid=torch.tensor([clip.valid for clip in clips]),
    )
