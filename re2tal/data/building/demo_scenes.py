"""What happens in the demo videos, and what each frame shows; `demo` writes them to files.

A patterned object slides left, right, up or down, or circles clockwise or anticlockwise, for a few seconds at a time.

* The picture is a torus: what leaves on one side comes back on the other. Objects start anywhere, so at every moment
  of every class the object is equally likely to be anywhere, and no single frame says which way it moves.
* Every object is drawn anew: shape, size, turn, two colours, pattern. Every video has its own background.
* Before and after its action an object may stand still, or come and go with it; some objects only ever stand still;
  for stretches there is no object. So its presence does not say when something happens.
* The background drifts and small dots wander from the first frame to the last. So neither does motion.

Trimmed clips show one such action from the first frame to the last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from re2tal.data.building.demo_sprites import PHASES, Sprite, draw_sprite, random_direction
from re2tal.structures import Action, VideoRecord

# How hard it is. Lengths are shares of the picture's short side: 0.32 a second is 2.6 pixels a frame at 64 pixels and
# 8 frames a second.
SPEED_PER_SECOND = (0.28, 0.42)
CIRCLE_RADIUS = (0.10, 0.15)
OBJECT_SIZE = (0.40, 0.55)
NUM_DOTS = (2, 4)
DOT_SIZE = (0.05, 0.09)
DOT_SPEED_PER_SECOND = 0.25
BACKGROUND_SPEED_PER_SECOND = 0.05
BACKGROUND_LEVELS = (20, 90)  # below demo_sprites.OBJECT_CONTRAST, objects are always brighter than the background
BACKGROUND_CONTRAST = 14
ACTION_SECONDS = (1.5, 5.0)
STILL_SECONDS = (0.3, 0.9)
STILL_SHARE = 0.6
EMPTY_SECONDS = (0.2, 1.2)
DECOY_SHARE = 0.2

VIDEO_SECONDS = (8.0, 30.0)
CLIP_SECONDS = (2.5, 4.5)
RATES = (Fraction(24), Fraction(25), Fraction(30000, 1001), Fraction(30))
SIZES = ((96, 96), (112, 96), (128, 96), (128, 128), (112, 144), (160, 120), (144, 176), (192, 144))
SUBSETS = ("training", "validation")

Motion = Callable[[np.ndarray, float, float, float], np.ndarray]


def _slide(right: int, down: int) -> Motion:
    def offsets(seconds: np.ndarray, speed: float, radius: float, phase: float) -> np.ndarray:
        return speed * seconds[:, None] * np.array([right, down])

    return offsets


def _circle(turn: int) -> Motion:
    def offsets(seconds: np.ndarray, speed: float, radius: float, phase: float) -> np.ndarray:
        # y points down, so growing angles turn clockwise on the screen
        angles = phase + turn * seconds * speed / radius
        return radius * np.stack([np.cos(angles) - np.cos(phase), np.sin(angles) - np.sin(phase)], axis=1)

    return offsets


CLASSES: dict[str, Motion] = {
    "slide left": _slide(-1, 0),
    "slide right": _slide(1, 0),
    "slide up": _slide(0, -1),
    "slide down": _slide(0, 1),
    "circle clockwise": _circle(1),
    "circle anticlockwise": _circle(-1),
}
"""Label -> where the object is, right and down of its start in short sides, after so many seconds."""


@dataclass(frozen=True, slots=True)
class Actor:
    """Something that is drawn in some frames: `centres[i]` (x, y) in quarter pixels in frame `first + i`."""

    sprite: Sprite
    first: int
    centres: np.ndarray


@dataclass(frozen=True, slots=True)
class Scene:
    """One video, ready to be drawn."""

    record: VideoRecord
    rate: Fraction
    background: np.ndarray
    """(H, W, 3) uint8, a torus"""
    shifts: np.ndarray
    """(N, 2) int, how far the background has moved down and right in each frame"""
    actors: tuple[Actor, ...]
    """dots first, so that objects cover them"""

    def frame(self, number: int) -> np.ndarray:
        """(H, W, 3) uint8 RGB."""
        picture = np.roll(self.background, self.shifts[number], axis=(0, 1))
        for actor in self.actors:
            if 0 <= number - actor.first < len(actor.centres):
                actor.sprite.paste(picture, actor.centres[number - actor.first])
        return picture


def draw_scene(*, subset: str, number: int, seed: int) -> Scene:
    """Video `number` of `subset` in the data set of `seed`."""
    rng = np.random.default_rng([seed, SUBSETS.index(subset), number])
    empty = _empty_scene(rng, lambda: rng.triangular(VIDEO_SECONDS[0], 15, VIDEO_SECONDS[1]))
    actors = list(empty.dots)
    actions = []
    for appears, action, leaves in _script(rng, duration_seconds=len(empty.seconds) / float(empty.rate)):
        first, last = np.searchsorted(empty.seconds, (appears, leaves))
        seconds = empty.seconds[first:last]
        actors.append(_object(rng, seconds, first=int(first), action=action, size=empty.size, base=empty.base))
        actions += [action] if action else []
    record = VideoRecord(f"demo_{subset}_{number:04d}", subset, empty.duration_seconds, tuple(actions))
    return Scene(record, empty.rate, empty.background, empty.shifts, tuple(actors))


def draw_clip(*, subset: str, number: int, seed: int) -> Scene:
    """Trimmed clip `number` of `subset`: one object that acts from the first frame to the last."""
    rng = np.random.default_rng([seed, SUBSETS.index(subset), number, 1])
    empty = _empty_scene(rng, lambda: rng.uniform(*CLIP_SECONDS))
    action = Action(0.0, empty.duration_seconds, list(CLASSES)[number % len(CLASSES)])
    actor = _object(rng, empty.seconds, first=0, action=action, size=empty.size, base=empty.base)
    record = VideoRecord(f"demo_clip_{subset}_{number:04d}", subset, empty.duration_seconds, (action,))
    return Scene(record, empty.rate, empty.background, empty.shifts, (*empty.dots, actor))


class _EmptyScene(NamedTuple):
    """What every video has before anything happens in it; the fields are those of `Scene`."""

    rate: Fraction
    seconds: np.ndarray
    """(N,) when each frame is shown"""
    size: np.ndarray
    """width and height"""
    base: np.ndarray
    """(3,) mean levels of the background"""
    background: np.ndarray
    shifts: np.ndarray
    dots: tuple[Actor, ...]

    @property
    def duration_seconds(self) -> float:
        return round(float(len(self.seconds) / self.rate), 6)


def _empty_scene(rng: np.random.Generator, draw_seconds: Callable[[], float]) -> _EmptyScene:
    rate = RATES[rng.integers(len(RATES))]
    width, height = SIZES[rng.integers(len(SIZES))]
    num_frames = int(draw_seconds() * rate)
    seconds = np.arange(num_frames) / float(rate)
    size = np.array([width, height])
    base = rng.uniform(*BACKGROUND_LEVELS, size=3)
    background = _texture(rng, height=height, width=width, base=base)
    shifts = np.rint(seconds[:, None] * random_direction(rng) * BACKGROUND_SPEED_PER_SECOND * min(size)).astype(int)
    dots = [_dot(rng, seconds=seconds, size=size, base=base) for _ in range(rng.integers(*NUM_DOTS, endpoint=True))]
    return _EmptyScene(rate, seconds, size, base, background, shifts, tuple(dots))


def _script(rng: np.random.Generator, *, duration_seconds: float) -> Iterator[tuple[float, Action | None, float]]:
    """When an object appears, what it does, when it leaves; one after the other, at least one of them acting."""
    labels = rng.permutation(np.repeat(list(CLASSES), 4)).tolist()
    now = rng.uniform(0, EMPTY_SECONDS[1])
    acted = False
    while True:
        lead, trail = (rng.uniform(*STILL_SECONDS) * (rng.random() < STILL_SHARE) for _ in range(2))
        longest = min(ACTION_SECONDS[1], duration_seconds - 0.1 - now - lead)
        if longest < ACTION_SECONDS[0]:
            return
        length = rng.uniform(ACTION_SECONDS[0], longest)
        start, end = round(now + lead, 2), round(now + lead + length, 2)
        action = None if acted and rng.random() < DECOY_SHARE else Action(start, end, labels.pop())
        leaves = min(end + trail, duration_seconds) if action else start + length / 2
        acted = True
        yield (now if lead else start), action, leaves
        now = leaves + rng.uniform(*EMPTY_SECONDS)


def _object(
    rng: np.random.Generator,
    seconds: np.ndarray,
    *,
    first: int,
    action: Action | None,
    size: np.ndarray,
    base: np.ndarray,
) -> Actor:
    """The object of one visit, seen at `seconds`: it stands still, or stands still around its action."""
    offsets = np.zeros((len(seconds), 2))
    if action:
        elapsed = np.clip(seconds, action.start_seconds, action.end_seconds) - action.start_seconds
        speed, radius, phase = rng.uniform(*SPEED_PER_SECOND), rng.uniform(*CIRCLE_RADIUS), rng.uniform(0, 2 * np.pi)
        offsets = CLASSES[action.label](elapsed, speed, radius, phase)
    sprite = draw_sprite(rng, diameter=rng.uniform(*OBJECT_SIZE) * min(size), base=base)
    return Actor(sprite, first, _quarter_pixels(rng.random(2) * size + offsets * min(size)))


def _dot(rng: np.random.Generator, *, seconds: np.ndarray, size: np.ndarray, base: np.ndarray) -> Actor:
    """A small disc that wanders from the first frame to the last, changing its mind about twice a second."""
    turns = int(seconds[-1] * 2) + 2
    velocities = np.stack([random_direction(rng) for _ in range(turns)]) * DOT_SPEED_PER_SECOND * min(size)
    steps = velocities[(seconds * 2).astype(int)] * (seconds[1] - seconds[0])
    sprite = draw_sprite(rng, diameter=rng.uniform(*DOT_SIZE) * min(size), base=base, shapes=("disc",))
    return Actor(sprite, 0, _quarter_pixels(rng.random(2) * size + np.cumsum(steps, axis=0)))


def _quarter_pixels(positions: np.ndarray) -> np.ndarray:
    return np.rint(positions * PHASES).astype(int)


def _texture(rng: np.random.Generator, *, height: int, width: int, base: np.ndarray) -> np.ndarray:
    """A soft pattern without seams: waves that fit the picture a whole number of times."""
    rows, columns = np.mgrid[:height, :width] / np.array([height, width])[:, None, None]
    pattern = np.zeros((height, width, 3))
    for _ in range(5):
        down, right = rng.integers(-5, 6, size=2)
        wave = np.sin(2 * np.pi * (down * rows + right * columns + rng.random()))
        pattern += wave[..., None] * rng.normal(size=3)
    return np.rint(np.clip(base + pattern * BACKGROUND_CONTRAST / np.sqrt(5), 0, 255)).astype(np.uint8)
