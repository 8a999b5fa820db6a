"""Clips to batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from re2tal.structures import Action, ClipBatch, FeatureBatch, Timeline


class Clip(NamedTuple):
    """One clip, cut to its final size but not normalised."""

    content: Tensor
    """(3, T, H, W) uint8 RGB frames, or (C, T) float32 features"""
    mask: Tensor
    """(T,) bool"""
    actions: tuple[Action, ...]
    timeline: Timeline
    video_id: str
    window_id: int
    valid: bool


def collate(clips: Sequence[Clip]) -> ClipBatch:
    """Stack B clips of frames of one size."""
    return ClipBatch(*_columns(clips))


def collate_features(clips: Sequence[Clip]) -> FeatureBatch:
    """Stack B clips of features of one length."""
    return FeatureBatch(*_columns(clips))


def _columns(clips: Sequence[Clip]) -> tuple:
    """The fields that both kinds of batch have, in their order."""
    content, masks, actions, timelines, video_ids, window_ids, valid = zip(*clips, strict=True)
    return torch.stack(content), torch.stack(masks), actions, timelines, video_ids, window_ids, torch.tensor(valid)
