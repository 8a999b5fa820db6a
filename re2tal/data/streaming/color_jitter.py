"""mmaction2's ColorJitter, drawn per clip, on uint8 frames: brightness, contrast, saturation and hue in a drawn order.

It is not torchvision's: values are not clipped between the steps, and hue turns by up to 50 degrees in steps of two, on
OpenCV's 8-bit HSV. mmaction2 draws the order once per process; here each clip draws it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

# mmaction2's defaults, with which OpenTAD's recipes train.
STRENGTH, HUE = 0.5, 0.1
# mmaction2's digits; BT.601 in transforms.GREY has one less.
_GREY = (0.2989, 0.587, 0.114)
# OpenCV's HSV of 8 bits: hue in 180 steps, and division by multiplying with 12 binary digits after the point.
_DIGITS = 12
_LEVELS = np.maximum(np.arange(256), 1)
_PER_VALUE = torch.from_numpy(np.rint((255 << _DIGITS) / _LEVELS).astype(np.int32))
_PER_SPREAD = torch.from_numpy(np.rint((180 << _DIGITS) / (6.0 * _LEVELS)).astype(np.int32))


@dataclass(frozen=True)
class ColorJitter:
    """One draw."""

    brightness: float
    contrast: float
    saturation: float
    hue: float
    """share of a turn, as mmaction2 counts it: 255 are 180 steps of two degrees"""
    order: tuple[int, ...]
    """0 brightness, 1 contrast, 2 saturation, 3 hue"""

    def __call__(self, frames: Tensor) -> None:
        """Changes frames (3, T, H, W) uint8 in place."""
        steps = (self._brighten, self._contrast, self._saturate, self._turn)
        for frame in frames.unbind(1):  # one by one: a frame of floats fits into a cache
            pixels = frame.float()
            for number in self.order:
                pixels = steps[number](pixels)
            # Clamped only here, at the end, and cut to whole levels by the copy: as mmaction2 does.
            frame.copy_(pixels.clamp_(0, 255))

    def _brighten(self, pixels: Tensor) -> Tensor:
        return pixels.mul_(self.brightness)

    def _contrast(self, pixels: Tensor) -> Tensor:
        mean = float(_grey(pixels).mean())
        return pixels.mul_(self.contrast).add_((1 - self.contrast) * mean)

    def _saturate(self, pixels: Tensor) -> Tensor:
        rest = _grey(pixels).mul_(1 - self.saturation)
        return pixels.mul_(self.saturation).add_(rest)

    def _turn(self, pixels: Tensor) -> Tensor:
        if self.hue == 0:
            return pixels
        hue, saturation, value = to_hsv(pixels.clamp_(0, 255).to(torch.uint8))
        # int() cuts towards zero, as mmaction2 does.
        return from_hsv(hue.add_(int(255 * self.hue)).remainder_(180), saturation, value)


def draw_color_jitter(generator: np.random.Generator) -> ColorJitter:
    """Factors from 0.5 to 1.5, a hue from -0.1 to 0.1, and an order."""
    brightness, contrast, saturation = generator.uniform(1 - STRENGTH, 1 + STRENGTH, 3).tolist()
    hue = float(generator.uniform(-HUE, HUE))
    return ColorJitter(brightness, contrast, saturation, hue, tuple(generator.permutation(4).tolist()))


def _grey(pixels: Tensor) -> Tensor:
    """(3, H, W) float -> (H, W)."""
    red, green, blue = pixels
    return red.mul(_GREY[0]).add_(green, alpha=_GREY[1]).add_(blue, alpha=_GREY[2])


def to_hsv(frame: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(3, H, W) uint8 RGB -> three (H, W) int32: hue 0 to 179, saturation and value 0 to 255, to OpenCV's bits."""
    red, green, blue = frame.int()
    value, least = torch.maximum(torch.maximum(red, green), blue), torch.minimum(torch.minimum(red, green), blue)
    spread = value - least
    half = 1 << (_DIGITS - 1)
    saturation = (spread * _PER_VALUE.take(value.long()) + half) >> _DIGITS
    sixths = torch.where(value == green, blue - red + 2 * spread, red - green + 4 * spread)
    sixths = torch.where(value == red, green - blue, sixths)
    hue = (sixths * _PER_SPREAD.take(spread.long()) + half) >> _DIGITS
    return hue.remainder_(180), saturation, value


@cache
def _shares() -> Tensor:
    """(3, 180 * 256) float32: the share of the value that each channel has, by hue and saturation.

    It is 1 - saturation * k, where k is 0, 1, or the way between two corners of the colour circle. In float64, because
    OpenCV's product and difference are rounded once.
    """
    sixths = (np.arange(180, dtype=np.float32) * np.float32(6 / 180)).astype(np.float64)
    strength = (np.arange(256, dtype=np.float32) * np.float32(1 / 255)).astype(np.float64)
    places = (sixths + np.array([[5.0], [3.0], [1.0]])) % 6
    ways = np.minimum(places, 4 - places).clip(0, 1).astype(np.float32).astype(np.float64)
    return torch.from_numpy((1 - ways[:, :, None] * strength).astype(np.float32).reshape(3, -1))


def from_hsv(hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    """The way back: (3, H, W) float32 RGB of whole levels."""
    place = hue.mul(256).add_(saturation).flatten()
    pixels = torch.stack([shares.index_select(0, place) for shares in _shares()]).view(3, *hue.shape)
    pixels.mul_(value.float().mul_(1 / 255)).mul_(255)
    # OpenCV cuts the 32 pixels that it converts at once, and rounds what is left of a row.
    whole = pixels.shape[2] // 32 * 32
    pixels[:, :, :whole].trunc_()
    pixels[:, :, whole:].round_()
    return pixels
