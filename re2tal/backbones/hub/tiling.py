"""Long video through networks that were trained on short clips.

    frames (B, 3, T, H, W) -> B * ceil(T / L) clips of L frames -> encoder -> ceil(T / tubelet) steps (B, C, T')

Clips are neighbours and do not overlap. They are encoded all together, or in groups (`clip_groups`). What lies past the
last valid frame of a video is replaced by that frame, so the features of a video do not depend on how far its batch was
padded. Those of an encoder that crosses clips do: its last steps see what follows, so give it windows of the length
that it was trained on, as all commands here do.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial
from math import ceil
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from re2tal.backbones.base import VideoBackbone, steps_mask
from re2tal.backbones.clip_groups import encode_in_groups
from re2tal.backbones.clip_memory import ClipMemory
from re2tal.reversible.chunking import even_spans
from re2tal.rewire import CheckpointedModule, recompute_conv_inputs
from re2tal.structures import Features


class ClipEncoder(nn.Module, ABC):
    """A network for clips of one fixed length, which each family of clip-wise backbones provides."""

    out_channels: int
    clip_frames: int
    """L, the number of frames it was trained on; 1 for image networks."""
    size: tuple[int, int]
    """Rows and columns of the frames it was trained on."""
    patch: tuple[int, int, int]
    """Frames, rows and columns that become one token; `clip_frames` is a multiple of patch[0]."""
    crosses_clips: bool = False
    """Whether a clip's features depend on its neighbours. It is then called with `clips_per_video` too: (N, ...) are
    the clips of N / `clips_per_video` videos, one video after another."""

    @abstractmethod
    def forward(self, clips: Tensor) -> Tensor:
        """(N, L, 3, H, W) normalised float frames -> (N, L / patch[0], C), pooled over space.

        H and W are any multiples of the patch, whatever size the network was trained on.
        """


class ClipwiseBackbone(VideoBackbone, CheckpointedModule):
    """Cuts video of any length into clips, encodes them, and puts their steps back in order.

    Clips are a copy of the frames. A network that is rewired to recompute keeps only the frames, and cuts them again in
    backward.
    """

    clips_at_once: int | None = None
    """How many clips of a batch are encoded at a time, at least one of each video; None for all. See `clip_groups`."""
    memory: ClipMemory | None = None
    """Where training takes the features of clips that it does not train; None trains all."""

    def __init__(self, encoder: ClipEncoder) -> None:
        super().__init__()
        if encoder.clip_frames % encoder.patch[0]:
            raise ValueError(
                f"{type(encoder).__name__} takes clips of {encoder.clip_frames} frames, which tubelets of "
                f"{encoder.patch[0]} frames do not fill; correct the number of frames in its config.json"
            )
        self.encoder = encoder
        self.out_channels = encoder.out_channels
        self.frames_per_step = encoder.patch[0]

    def forward(self, frames: Tensor, mask: Tensor) -> Features:
        """(B, 3, T, H, W) normalised float frames and their (B, T) bool mask -> Features (B, C, ceil(T / tubelet)).

        A step is valid where any of its frames is. Raises ValueError where T is shorter than a tubelet, or H or W is
        no multiple of the patch.
        """
        check_size(frames.shape, patch=self.encoder.patch, network=type(self.encoder).__name__)
        every = range(ceil(frames.shape[2] / self.encoder.clip_frames))
        # A copy, from which backward cuts clips again: the caller may write to its own.
        encoded = partial(self._encoded, frames, mask.clone())
        per_clip = self.encoder.clip_frames // self.frames_per_step
        if self.memory is not None and self.training and torch.is_grad_enabled():
            steps = self.memory.features(encoded, num_clips=len(every), steps=per_clip, channels=self.out_channels)
        else:
            steps = encoded(every)
        valid = steps_mask(mask, frames_per_step=self.frames_per_step)
        return Features(steps.flatten(1, 2)[:, : valid.shape[1]].transpose(1, 2), valid)

    def _encoded(self, frames: Tensor, mask: Tensor, clips: Sequence[int]) -> Tensor:
        """Steps of these clips of every video, (B, clips, L / tubelet, C)."""
        at_once = len(clips) if self.clips_at_once is None else max(1, self.clips_at_once // len(frames))
        groups = even_spans(len(clips), ceil(len(clips) / at_once))
        cuts = [
            partial(cut, mask=mask, clip_frames=self.encoder.clip_frames, clips=clips[start:stop])
            for start, stop in groups
        ]
        if len(groups) > 1:
            spans = [slice(*group) for group in groups]
            return encode_in_groups(self._encode, cuts, frames, spans=spans, owner=self.encoder)
        if self.checkpointing and torch.is_grad_enabled():
            with recompute_conv_inputs(self.encoder, cuts[0], frames) as cut_once:
                return self._encode(cut_once)
        return self._encode(cuts[0](frames))

    def _encode(self, clips: Tensor) -> Tensor:
        """(B, clips, L, 3, H, W) -> (B, clips, L / tubelet, C)."""
        neighbours = {"clips_per_video": clips.shape[1]} if self.encoder.crosses_clips else {}
        return self.encoder(clips.flatten(0, 1), **neighbours).unflatten(0, clips.shape[:2])


def check_size(shape: torch.Size, *, patch: tuple[int, int, int], network: str) -> None:
    """Raise ValueError unless (B, 3, T, H, W) holds a whole tubelet and whole patches."""
    num_frames, height, width = shape[2:]
    if num_frames < patch[0]:
        raise ValueError(f"{network} makes one step of {patch[0]} frames; a clip of {num_frames} is too short")
    if height % patch[1] or width % patch[2]:
        raise ValueError(
            f"{network} cuts frames into patches of {patch[1]} x {patch[2]} pixels, which {height} x {width} is no "
            f"multiple of; crop or resize to {_nearest(height, patch[1])} x {_nearest(width, patch[2])}"
        )


def _nearest(size: int, patch: int) -> int:
    return max(patch, round(size / patch) * patch)


def cut(frames: Tensor, mask: Tensor, *, clip_frames: int, clips: Sequence[int]) -> Tensor:
    """(B, 3, T, H, W), (B, T) bool -> (B, clips, L, 3, H, W): these clips; past the last valid frame, that frame."""
    time = torch.arange(mask.shape[1], device=mask.device)
    last_valid = (time * mask).amax(dim=1, keepdim=True)
    # Not `tensor` for a range, too: the host would wait for the copy.
    is_range, device = isinstance(clips, range), mask.device
    numbers = torch.arange(clips[0], clips[-1] + 1, device=device) if is_range else torch.tensor(clips, device=device)
    first = numbers * clip_frames
    source = (first[:, None] + torch.arange(clip_frames, device=mask.device)).flatten().minimum(last_valid)
    videos = torch.arange(len(frames), device=mask.device)[:, None]
    return frames.transpose(1, 2)[videos, source].unflatten(1, (len(clips), clip_frames))


def pair(size: int | Sequence[int]) -> tuple[int, int]:
    """Rows and columns of a size; configurations give one number if both are equal."""
    rows, columns = (size, size) if isinstance(size, int) else size
    return rows, columns


def resize_positions(
    table: Tensor,
    *,
    grid: tuple[int, int, int],
    new_grid: tuple[int, int, int],
    mode: Literal["bicubic", "nearest"] = "bicubic",
) -> Tensor:
    """Resamples a position table (1, time * rows * columns, C) from one (time, rows, columns) grid to another.

    Rows and columns only, in each time slice: image ViTs move to other sizes so, with "bicubic". ValueError for another
    number of time steps.
    """
    if grid == new_grid:
        return table
    if grid[0] != new_grid[0]:
        raise ValueError(f"the position table covers {grid[0]} time steps, the clip has {new_grid[0]}")
    # Half precision would shift the resampled positions.
    slices = table.unflatten(1, grid)[0].movedim(-1, 1).to(torch.promote_types(table.dtype, torch.float32))
    resized = F.interpolate(slices, size=new_grid[1:], mode=mode)
    return resized.to(table.dtype).movedim(1, -1).flatten(0, 2)[None]
