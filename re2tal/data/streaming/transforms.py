"""What happens to pixels between decoding and the backbone.

    worker, uint8    one box and one mirror bit per clip: crop, resize, flip
    device, float    colour and normalisation as one affine map of RGB per clip: y = matrix @ x + bias

Frames travel as uint8: floats would be four times the bytes and a second of CPU per clip. Brightness, contrast,
saturation and hue are all affine in RGB, so any jitter costs as much as none; values are not clamped in between.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)
"""Of ImageNet's RGB values from 0 to 255, as the published backbones take them."""
# BT.601.
GREY = (0.299, 0.587, 0.114)
FRAMES_AT_ONCE = 64
"""How many frames of a batch are coloured at a time."""
# RGB -> YIQ (NTSC); a rotation of I and Q is a change of hue. Its first row is GREY.
_YIQ = torch.tensor([GREY, (0.595716, -0.274453, -0.321263), (0.211456, -0.522591, 0.311135)], dtype=torch.float64)
_RGB = torch.linalg.inv(_YIQ)


class Box(NamedTuple):
    """A part of a picture, in pixels."""

    top: int
    left: int
    height: int
    width: int


def square_box(height: int, width: int, *, place: float = 0.5) -> Box:
    """The largest square: `place` 0 at the start of the longer side, 0.5 in the middle, 1 at its end."""
    side = min(height, width)
    # Rounded down, as the centre crops of mmaction2 are.
    return Box(int((height - side) * place), int((width - side) * place), side, side)


def draw_box(
    height: int,
    width: int,
    *,
    area: tuple[float, float],
    aspect: tuple[float, float],
    generator: np.random.Generator,
) -> Box:
    """A random part of a picture with a share `area` of it and a width to height ratio in `aspect` (log-uniform).

    If ten draws do not fit into the picture, the centre square.
    """
    # torchvision and mmaction2 try as often; wide crops of tall pictures do not fit.
    for _ in range(10):
        pixels = height * width * generator.uniform(*area)
        ratio = math.exp(generator.uniform(math.log(aspect[0]), math.log(aspect[1])))
        box_height, box_width = round(math.sqrt(pixels / ratio)), round(math.sqrt(pixels * ratio))
        if 0 < box_height <= height and 0 < box_width <= width:
            top = int(generator.integers(height - box_height, endpoint=True))
            left = int(generator.integers(width - box_width, endpoint=True))
            return Box(top, left, box_height, box_width)
    return square_box(height, width)


def crop_and_resize(frames: Tensor, box: Box, *, size: int, flip: bool = False, into: Tensor | None = None) -> Tensor:
    """(T, H, W, 3) uint8 -> (3, T, size, size) uint8: `box` stretched to a square, mirrored left to right if `flip`.

    The result is written to `into`, where it is given.
    """
    top, left, height, width = box
    cut = frames[:, top : top + height, left : left + width].permute(0, 3, 1, 2)  # channels last: the fast path
    if (height, width) != (size, size):
        # Antialiased: plain bilinear skips most pixels of a picture that is much larger.
        cut = F.interpolate(cut, size=(size, size), mode="bilinear", antialias=True, align_corners=False)
    if into is None:
        into = torch.empty(3, len(frames), size, size, dtype=frames.dtype)
    into.copy_(cut.transpose(0, 1))
    return into.copy_(into.flip(-1)) if flip else into  # in this layout a row is mirrored at once


def normalise(frames: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """(B, 3, T, H, W) uint8 -> the same shape in `dtype`: (x - MEAN) / STD."""
    pixels = frames.float()
    mean, std = (pixels.new_tensor(values).view(3, 1, 1, 1) for values in (MEAN, STD))
    return pixels.sub_(mean).div_(std).to(dtype)


def draw_colours(frames: Tensor, *, strength: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A change of colours, drawn once per clip from `generator` (a CPU one), and `normalise`, as one affine map of RGB.

    (B, 3, T, H, W) uint8 -> (B, 3, 3) matrices and (B, 3) biases. Brightness, contrast (about the clip's mean grey) and
    saturation are scaled by factors from 1 - strength to 1 + strength; hue turns by up to a quarter of `strength` full
    turns.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"colour jitter is {strength}; give a strength from 0 to 1")
    # Drawn on the CPU: a device's generator gives other numbers on another device.
    changes = (torch.rand(len(frames), 4, generator=generator) * 2 - 1) * strength
    mean_rgb = frames.flatten(2).float().mean(dim=2)
    matrix, bias = colour_map(changes.to(mean_rgb), (mean_rgb * mean_rgb.new_tensor(GREY)).sum(1))
    mean, std = mean_rgb.new_tensor(MEAN), mean_rgb.new_tensor(STD)
    return matrix / std[:, None], (bias - mean) / std


def recolour(frames: Tensor, matrix: Tensor, bias: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """(B, 3, T, H, W) uint8 -> matrix @ RGB + bias, the same shape in `dtype`, and the same bits under autocast too."""
    mapped = frames.new_empty(frames.shape, dtype=dtype)
    with torch.autocast(frames.device.type, enabled=False):
        # In parts: all of it in float32, twice, would take eight bytes a number more.
        for part, place in zip(frames.split(FRAMES_AT_ONCE, 2), mapped.split(FRAMES_AT_ONCE, 2), strict=True):
            place.copy_(torch.baddbmm(bias[:, :, None], matrix, part.flatten(2).float()).view(part.shape))
    return mapped


def colour_map(changes: Tensor, mean_grey: Tensor) -> tuple[Tensor, Tensor]:
    """One affine map of RGB per clip: (B, 3, 3) matrices and (B, 3) biases.

    `changes` (B, 4): how far brightness, contrast and saturation are scaled from 1, and four times the turns of hue;
    `mean_grey` (B,): what contrast scales about, before any change. Applied in this order.
    """
    brightness, contrast, saturation = (1 + changes[:, :3]).unbind(1)
    angle = changes[:, 3] * (2 * math.pi / 4)
    cosine, sine = angle.cos() * saturation, angle.sin() * saturation
    turn = changes.new_zeros(len(changes), 3, 3)
    turn[:, 0, 0] = 1
    turn[:, 1, 1], turn[:, 1, 2], turn[:, 2, 1], turn[:, 2, 2] = cosine, -sine, sine, cosine
    matrix = _RGB.to(turn) @ turn @ _YIQ.to(turn) * (brightness * contrast)[:, None, None]
    # Saturation and hue leave greys alone, so the bias of contrast passes through them unchanged.
    bias = ((1 - contrast) * brightness * mean_grey)[:, None].expand(-1, 3)
    return matrix, bias
