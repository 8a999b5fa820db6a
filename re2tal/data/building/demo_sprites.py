"""The objects and dots of the demo videos: small pictures with soft edges, drawn to a quarter of a pixel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

OBJECT_CONTRAST = 90  # least difference of mean levels between object and background
PHASES = 4  # objects are placed to a quarter of a pixel


@dataclass(frozen=True, slots=True)
class Sprite:
    """A small picture with its opacity, drawn at each quarter-pixel shift."""

    pictures: np.ndarray
    """(PHASES, PHASES, h, w, 3) float32: colour times opacity, by shift down and right"""
    opacity: np.ndarray
    """(PHASES, PHASES, h, w, 1) float32"""

    def paste(self, frame: np.ndarray, centre: np.ndarray) -> None:
        """Blend into (H, W, 3) uint8 around `centre`, (x, y) in quarter pixels, wrapping at the borders."""
        (column, row), (right, down) = np.divmod(centre, PHASES)
        height, width = self.opacity.shape[2:4]
        rows = (row - height // 2 + np.arange(height))[:, None] % frame.shape[0]
        columns = (column - width // 2 + np.arange(width)) % frame.shape[1]
        beneath = frame[rows, columns] * (1 - self.opacity[down, right])
        frame[rows, columns] = (beneath + self.pictures[down, right] + 0.5).astype(np.uint8)


SHAPES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "disc": lambda x, y: np.hypot(x, y) < 1,
    "ring": lambda x, y: (np.hypot(x, y) < 1) & (np.hypot(x, y) > 0.45),
    "square": lambda x, y: np.maximum(abs(x), abs(y)) < 0.8,
    "cross": lambda x, y: (np.minimum(abs(x), abs(y)) < 0.32) & (np.maximum(abs(x), abs(y)) < 0.95),
    "triangle": lambda x, y: (y < 0.6) & (abs(x) * 1.6 - y < 0.9),
    "star": lambda x, y: np.hypot(x, y) < 0.7 + 0.3 * np.cos(5 * np.arctan2(y, x)),
}
PATTERNS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "plain": lambda x, y: x < 9,
    "halves": lambda x, y: x < 0,
    "stripes": lambda x, y: np.sin(9 * x) > 0,
    "checks": lambda x, y: np.sin(6 * x) * np.sin(6 * y) > 0,
    "core": lambda x, y: np.hypot(x, y) < 0.55,
}


def draw_sprite(
    rng: np.random.Generator, *, diameter: float, base: np.ndarray, shapes: Sequence[str] = tuple(SHAPES)
) -> Sprite:
    """A random shape in a random pattern, turned at random, in colours that stand out from `base`."""
    shape = SHAPES[shapes[int(rng.integers(len(shapes)))]]
    pattern = list(PATTERNS.values())[rng.integers(len(PATTERNS))]
    (cosine, sine), colours = random_direction(rng), [_standing_out(rng, base) for _ in range(2)]
    pixels = int(np.ceil(diameter)) + 2
    # One sample per quarter pixel: 16 of them make a pixel with smooth edges, and a shift is another first sample.
    axis = (np.arange((pixels + 1) * PHASES) - (pixels + 1) * PHASES / 2 + 0.5) / (diameter * PHASES / 2)
    rows, columns = np.meshgrid(axis, axis, indexing="ij")
    x, y = cosine * columns + sine * rows, cosine * rows - sine * columns
    inside = shape(x, y)[..., None]
    fine = np.concatenate([np.where(pattern(x, y)[..., None], *colours) * inside, inside], axis=-1)
    half = sliding_window_view(fine, PHASES, axis=0).mean(axis=-1)
    pixel_means = sliding_window_view(half, PHASES, axis=1).mean(axis=-1)
    starts = [slice(PHASES - shift, PHASES - shift + pixels * PHASES, PHASES) for shift in range(PHASES)]
    layers = np.stack([[pixel_means[down, right] for right in starts] for down in starts]).astype(np.float32)
    return Sprite(layers[..., :3], layers[..., 3:])


def _standing_out(rng: np.random.Generator, base: np.ndarray) -> np.ndarray:
    """A colour that is clearly brighter or darker than the background."""
    while True:
        colour = rng.uniform(0, 255, size=3)
        if abs(colour.mean() - base.mean()) > OBJECT_CONTRAST:
            return colour


def random_direction(rng: np.random.Generator) -> np.ndarray:
    """(2,) of length 1."""
    angle = rng.uniform(0, 2 * np.pi)
    return np.array([np.cos(angle), np.sin(angle)])
