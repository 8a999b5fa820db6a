"""A small data set of real video files whose actions can only be told by their motion.

A patterned object slides left, right, up or down, or circles clockwise or anticlockwise, for a few seconds at a time.

* The picture is a torus: what leaves on one side comes back on the other. Objects start anywhere, so at every moment
  of every class the object is equally likely to be anywhere, and no single frame says which way it moves.
* Every object is drawn anew: shape, size, turn, two colours, pattern. Every video has its own background.
* Before and after its action an object may stand still, or come and go with it; some objects only ever stand still;
  for stretches there is no object. So its presence does not say when something happens.
* The background drifts and small dots wander from the first frame to the last. So neither does motion.

Trimmed clips show one such action from the first frame to the last.
Files are as people have them: H.264 in MP4 with B-frames and long groups of pictures, four frame rates, several sizes.
The same seed gives the same frames and annotations anywhere, and the same bytes where the encoder is the same.
Mirroring a picture turns one class into another: train on this with flips off.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple, TypeVar

import av
import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from re2tal.strict_json import read_json, write_json
from re2tal.structures import Action, VideoRecord

# How hard it is. Lengths are shares of the picture's short side: 0.32 a second is 2.6 pixels a frame at 64 pixels and
# 8 frames a second.
SPEED_PER_SECOND = (0.28, 0.42)
CIRCLE_RADIUS = (0.10, 0.15)
OBJECT_SIZE = (0.40, 0.55)
OBJECT_CONTRAST = 90  # least difference of mean levels between object and background
NUM_DOTS = (2, 4)
DOT_SIZE = (0.05, 0.09)
DOT_SPEED_PER_SECOND = 0.25
BACKGROUND_SPEED_PER_SECOND = 0.05
BACKGROUND_LEVELS = (20, 90)  # below OBJECT_CONTRAST, objects are always brighter than the background
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
PHASES = 4  # objects are placed to a quarter of a pixel

T = TypeVar("T")

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


@dataclass(frozen=True)
class DemoConfig:
    """What to write."""

    num_training: int = 96
    """videos in the training subset"""
    num_validation: int = 48
    """videos in the validation subset"""
    seed: int = 0
    """everything follows from it: another seed, another data set of the same kind"""

    def __post_init__(self) -> None:
        for name in ("num_training", "num_validation"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; a subset needs at least 1 video")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; give 0 or more")


def write_demo(folder: Path, config: DemoConfig, *, workers: int | None = None) -> Path:
    """Write `folder`/videos/*.mp4, then `folder`/annotations.json, whose path is returned.

    With the annotations of the same config already there, nothing is done. `workers` processes draw (default: one per
    core that this process may use); their number does not change the result.

    Raises:
        ValueError: if `folder` holds the annotations of something else.
    """
    annotations = folder / "annotations.json"
    version = f"re2tal demo 2, {config}"  # another number whenever the drawing changes
    if not _is_written(annotations, version):
        (folder / "videos").mkdir(parents=True, exist_ok=True)
        written = _in_processes(partial(_write_video, folder / "videos", config.seed), config, workers=workers)
        write_json(annotations, {"version": version, "taxonomy": _taxonomy(), "database": dict(written)})
    return annotations


def write_demo_clips(folder: Path, config: DemoConfig, *, workers: int | None = None) -> Path:
    """As `write_demo`, but trimmed clips: `folder`/clips/SUBSET/CLASS/*.mp4, then `folder`/clips.json, whose path is
    returned. Every class has as many clips as any other, or one more."""
    listing = folder / "clips.json"
    version = f"re2tal demo clips 1, {config}"
    if not _is_written(listing, version):
        for subset in SUBSETS:
            for label in CLASSES:
                (folder / "clips" / subset / label).mkdir(parents=True, exist_ok=True)
        written = _in_processes(partial(_write_clip, folder / "clips", config.seed), config, workers=workers)
        write_json(listing, {"version": version, "clips": written})
    return listing


def _is_written(listing: Path, version: str) -> bool:
    """Whether the file that is written last is there; ValueError where it is of something else."""
    if not listing.exists():
        return False
    found = read_json(listing)
    if not isinstance(found, dict) or found.get("version") != version:
        raise ValueError(f"{listing} is not of {version!r}; choose another folder, or delete this one")
    return True


def _in_processes(write: Callable[[tuple[str, int]], T], config: DemoConfig, *, workers: int | None) -> list[T]:
    counts = (config.num_training, config.num_validation)
    jobs = [(subset, number) for subset, count in zip(SUBSETS, counts, strict=True) for number in range(count)]
    with ProcessPoolExecutor(workers or len(os.sched_getaffinity(0)), mp_context=get_context("spawn")) as pool:
        return list(pool.map(write, jobs, chunksize=2))


def _taxonomy() -> list[dict[str, object]]:
    root: dict[str, object] = {"nodeId": 0, "nodeName": "Root", "parentId": None, "parentName": None}
    leaves = [
        {"nodeId": number, "nodeName": label, "parentId": 0, "parentName": "Root"}
        for number, label in enumerate(CLASSES, start=1)
    ]
    return [root, *leaves]


def _write_video(folder: Path, seed: int, job: tuple[str, int]) -> tuple[str, dict[str, object]]:
    subset, number = job
    scene = draw_scene(subset=subset, number=number, seed=seed)
    record = scene.record
    width, height = _encode(scene, folder / f"{record.video_id}.mp4")
    return record.video_id, {
        "duration": record.duration_seconds,
        "subset": subset,
        "resolution": f"{width}x{height}",
        "url": "",
        "annotations": [
            {"segment": [action.start_seconds, action.end_seconds], "label": action.label} for action in record.actions
        ],
    }


def _write_clip(folder: Path, seed: int, job: tuple[str, int]) -> str:
    subset, number = job
    scene = draw_clip(subset=subset, number=number, seed=seed)
    (action,) = scene.record.actions
    path = folder / subset / action.label / f"{scene.record.video_id}.mp4"
    _encode(scene, path)
    return str(path.relative_to(folder))


def _encode(scene: Scene, path: Path) -> tuple[int, int]:
    """Write a scene to a file; gives its (width, height)."""
    partial_file = path.with_suffix(".mp4.partial")
    with av.open(str(partial_file), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=scene.rate, options={"preset": "superfast", "crf": "20"})
        stream.height, stream.width = scene.background.shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.thread_count = 1
        for number in range(len(scene.shifts)):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(scene.frame(number), format="rgb24")))
        container.mux(stream.encode(None))
    partial_file.replace(path)
    return stream.width, stream.height


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
    shifts = np.rint(seconds[:, None] * _direction(rng) * BACKGROUND_SPEED_PER_SECOND * min(size)).astype(int)
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
    sprite = _sprite(rng, diameter=rng.uniform(*OBJECT_SIZE) * min(size), base=base)
    return Actor(sprite, first, _quarter_pixels(rng.random(2) * size + offsets * min(size)))


def _dot(rng: np.random.Generator, *, seconds: np.ndarray, size: np.ndarray, base: np.ndarray) -> Actor:
    """A small disc that wanders from the first frame to the last, changing its mind about twice a second."""
    turns = int(seconds[-1] * 2) + 2
    velocities = np.stack([_direction(rng) for _ in range(turns)]) * DOT_SPEED_PER_SECOND * min(size)
    steps = velocities[(seconds * 2).astype(int)] * (seconds[1] - seconds[0])
    sprite = _sprite(rng, diameter=rng.uniform(*DOT_SIZE) * min(size), base=base, shapes=("disc",))
    return Actor(sprite, 0, _quarter_pixels(rng.random(2) * size + np.cumsum(steps, axis=0)))


def _quarter_pixels(positions: np.ndarray) -> np.ndarray:
    return np.rint(positions * PHASES).astype(int)


def _direction(rng: np.random.Generator) -> np.ndarray:
    angle = rng.uniform(0, 2 * np.pi)
    return np.array([np.cos(angle), np.sin(angle)])


def _texture(rng: np.random.Generator, *, height: int, width: int, base: np.ndarray) -> np.ndarray:
    """A soft pattern without seams: waves that fit the picture a whole number of times."""
    rows, columns = np.mgrid[:height, :width] / np.array([height, width])[:, None, None]
    pattern = np.zeros((height, width, 3))
    for _ in range(5):
        down, right = rng.integers(-5, 6, size=2)
        wave = np.sin(2 * np.pi * (down * rows + right * columns + rng.random()))
        pattern += wave[..., None] * rng.normal(size=3)
    return np.rint(np.clip(base + pattern * BACKGROUND_CONTRAST / np.sqrt(5), 0, 255)).astype(np.uint8)


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


def _sprite(
    rng: np.random.Generator, *, diameter: float, base: np.ndarray, shapes: Sequence[str] = tuple(SHAPES)
) -> Sprite:
    """A random shape in a random pattern, turned at random, in colours that stand out from `base`."""
    shape = SHAPES[shapes[int(rng.integers(len(shapes)))]]
    pattern = list(PATTERNS.values())[rng.integers(len(PATTERNS))]
    (cosine, sine), colours = _direction(rng), [_standing_out(rng, base) for _ in range(2)]
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
