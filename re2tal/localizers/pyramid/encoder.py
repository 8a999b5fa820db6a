"""From features to a pyramid: convolutions, blocks of stride 1, then one block of stride 2 per further level."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from re2tal.localizers.masked import MaskedConv, blank
from re2tal.structures import Pyramid


class Encoder(nn.Module):
    """Runs the convolutions `embedding`, the blocks `stem` and the blocks `branch`, each of which gives one level.

    A block maps (B, C, T) and (B, T) to the same with T / stride steps. `disturb` changes the features first, in
    training. A sinusoid of `position_steps` steps is added after the embedding unless that is None.
    """

    position: Tensor | None

    def __init__(
        self,
        channels: int,
        *,
        embedding: Sequence[MaskedConv],
        branch: Sequence[nn.Module],
        stem: Sequence[nn.Module] = (),
        disturb: nn.Module | None = None,
        position_steps: int | None = None,
    ) -> None:
        super().__init__()
        self.disturb = disturb
        self.embedding = nn.ModuleList(embedding)
        self.stem = nn.ModuleList(stem)
        self.branch = nn.ModuleList(branch)
        encoding = None if position_steps is None else sinusoids(position_steps, channels)
        # Follows from the configuration, and stands in no checkpoint.
        self.register_buffer("position", encoding, persistent=False)

    def forward(self, x: Tensor, mask: Tensor) -> Pyramid:
        """(B, in_channels, T), (B, T) -> levels (B, channels, T / 2**l) and their masks, finest first."""
        if self.disturb is not None:
            x = self.disturb(x)
        for conv in self.embedding:
            x = conv(x, mask)
        if self.position is not None:
            # DeepSpeed narrows parameters and leaves buffers as they are.
            x = x + blank(stretch(self.position, x.shape[-1]).to(x.dtype), mask)
        for block in self.stem:
            x, mask = block(x, mask)
        levels, masks = [x], [mask]
        for block in self.branch:
            x, mask = block(x, mask)
            levels.append(x)
            masks.append(mask)
        return Pyramid(tuple(levels), tuple(masks))


def sinusoids(num_steps: int, channels: int) -> Tensor:
    """Sine and cosine of the position (Vaswani et al., 2017), divided by sqrt(channels): (1, channels, num_steps)."""
    # In float64: the angles reach thousands, of which float32 keeps few decimals.
    channel = torch.arange(channels, dtype=torch.float64)
    angle = torch.arange(num_steps, dtype=torch.float64) / 10_000 ** (2 * (channel[:, None] // 2) / channels)
    encoding = torch.where(channel[:, None] % 2 == 0, angle.sin(), angle.cos())
    return (encoding.float() / channels**0.5)[None]


def stretch(position: Tensor, num_steps: int) -> Tensor:
    """The encoding's first steps, or, for a clip longer than it, the encoding stretched over the clip."""
    # As the public implementations do with videos that are longer than any in training.
    if num_steps > position.shape[-1]:
        position = F.interpolate(position, size=num_steps, mode="linear", align_corners=False)
    return position[..., :num_steps]
