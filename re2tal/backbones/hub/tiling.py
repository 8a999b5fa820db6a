"""Long video through networks that were trained on short clips.

    frames (B, 3, T, H, W) -> B * ceil(T / L) clips of L frames -> encoder -> ceil(T / tubelet) steps (B, C, T')

Clips are neighbours and do not overlap. What lies past the last valid frame of a video is replaced by that frame, so
the features of a video do not depend on how far its batch was padded. Those of an encoder that crosses clips do: its
last steps see what follows, so give it windows of the length that it was trained on, as all commands here do.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from re2tal.backbones.base import VideoBackbone, steps_mask
from re2tal.rewire import CheckpointedModule, recompute_conv_inputs
from re2tal.structures import Features


class ClipEncoder(nn.Module, ABC):
    """A network for clips of one fixed length: what a family of clip-wise backbones has to provide."""

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
    """Video of any length: cut into clips, all clips of a batch encoded together, steps put back in order.

    Clips are a copy of the frames. Rewired to recompute, it keeps only the frames, and cuts them once more in backward.
    """

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
        with self._clips(frames, mask) as clips:
            neighbours = {"clips_per_video": clips.shape[1]} if self.encoder.crosses_clips else {}
            steps = self.encoder(clips.flatten(0, 1), **neighbours).unflatten(0, clips.shape[:2]).flatten(1, 2)
        valid = steps_mask(mask, frames_per_step=self.frames_per_step)
        return Features(steps[:, : valid.shape[1]].transpose(1, 2), valid)

    def _clips(self, frames: Tensor, mask: Tensor) -> AbstractContextManager[Tensor]:
        gather = partial(cut, clip_frames=self.encoder.clip_frames)
        if self.checkpointing and torch.is_grad_enabled():
            return recompute_conv_inputs(self.encoder, gather, frames, mask)
        return nullcontext(gather(frames, mask))


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


def cut(frames: Tensor, mask: Tensor, *, clip_frames: int) -> Tensor:
    """(B, 3, T, H, W), (B, T) bool -> (B, ceil(T / L), L, 3, H, W); past the last valid frame, that frame."""
    time = torch.arange(mask.shape[1], device=mask.device)
    last_valid = (time * mask).amax(dim=1, keepdim=True)
    num_clips = -(-mask.shape[1] // clip_frames)
    source = torch.arange(num_clips * clip_frames, device=mask.device).minimum(last_valid)
    videos = torch.arange(len(frames), device=mask.device)[:, None]
    return frames.transpose(1, 2)[videos, source].unflatten(1, (num_clips, clip_frames))


def pair(size: int | Sequence[int]) -> tuple[int, int]:
    """Rows and columns of a size that configurations give as one number where both are equal."""
    rows, columns = (size, size) if isinstance(size, int) else size
    return rows, columns


def resize_positions(
    table: Tensor,
    *,
    grid: tuple[int, int, int],
    new_grid: tuple[int, int, int],
    mode: Literal["bicubic", "nearest"] = "bicubic",
) -> Tensor:
    """Position table of a (time, rows, columns) grid, (1, time * rows * columns, C), resampled to `new_grid`.

    Over rows and columns, one time slice after another; time stays. Bicubic is how image ViTs are moved to other sizes.
    """
    if grid == new_grid:
        return table
    if grid[0] != new_grid[0]:
        raise ValueError(f"the position table covers {grid[0]} time steps, the clip has {new_grid[0]}")
    # Half precision would shift the resampled positions.
    slices = table.unflatten(1, grid)[0].movedim(-1, 1).to(torch.promote_types(table.dtype, torch.float32))
    resized = F.interpolate(slices, size=new_grid[1:], mode=mode)
    return resized.to(table.dtype).movedim(1, -1).flatten(0, 2)[None]
