"""Two of the fifteen operations of OpenTAD's ImgAug("default"), drawn per clip, on uint8 frames.

    draw -> [Rotate(+27 degrees), Posterize(3 bits)] -> each changes the frames (3, T, H, W) in place

Parameters are those of RandAugment's magnitude 9 of 10. Colour operations give Pillow's bits; geometric ones are exact
bilinear interpolation with black outside, where OpenCV's weights are coarse (3 levels apart at most). OpenTAD draws the
sign of a geometric operation once per process; here each clip draws it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Operation = Callable[[Tensor], None]
"""Changes frames (3, T, H, W) uint8 in place."""

# The largest values of imgaug's RandAugment at level 0.9: 17.19 degrees, 30 degrees, 0.2 of the side, and a factor of
# 0.1 + 1.8 * 0.9.
DEGREES_SHEARED = 15.471
DEGREES_TURNED = 27.0
SHARE_MOVED = 0.18
FACTOR = 1.72
SOLARIZED_FROM = 231 - 1  # ImgAug's threshold of 230.4 is cut to a whole level
_AT_ONCE = 16  # frames as floats, small enough for a cache


def draw_imgaug(generator: np.random.Generator) -> list[Operation]:
    """Two different operations, in the order of OPERATIONS, with their signs and places."""
    # Sorted: imgaug's SomeOf keeps the order of its list.
    numbers = np.sort(generator.choice(len(OPERATIONS), 2, replace=False))
    names = [list(OPERATIONS)[number] for number in numbers]
    return [OPERATIONS[name](1 if generator.random() < 0.5 else -1, generator) for name in names]


def grey(frames: Tensor) -> Tensor:
    """(3, ...) uint8 RGB -> (...) int32, as Pillow rounds it."""
    red, green, blue = frames.int()
    # Pillow's weights of BT.601, in 1/65536, rounded half up.
    return (19595 * red + 38470 * green + 7471 * blue + 32768) >> 16


# ------------------------------------------------------------------------------------------------------------- geometry


def warp(frames: Tensor, *, matrix: tuple[tuple[float, float], tuple[float, float]], move: tuple[float, float]) -> None:
    """Every pixel shows what was at `matrix` @ (x, y) + `move`, in shares of the width and height, from the centre."""
    height, width = frames.shape[2:]
    lengths, (x, y) = (width, height), (np.arange(width), np.arange(height)[:, None])
    places = []
    for (a, b), share, length in zip(matrix, move, lengths, strict=True):
        start = (length - 1) / 2 - (a * (width - 1) + b * (height - 1)) / 2 + share * length
        # OpenCV takes places in 1/32 pixels, and rounds before that to 1/1024.
        place = (np.rint((b * y + start) * 1024) + np.rint(a * x * 1024) + 16) // 32 / 32
        places.append((2 * place + 1) / length - 1)  # as grid_sample counts
    grid = torch.from_numpy(np.stack(places, -1))[None].float()
    for some in frames.split(_AT_ONCE, dim=1):
        pixels = some.reshape(1, -1, height, width).float()
        # Black outside, as OpenCV's warp leaves it. Shares of a picture, not pixels, so that any size moves alike.
        moved = F.grid_sample(pixels, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        some.copy_(moved.round_().view(some.shape))


def shear_x(frames: Tensor, *, degrees: float) -> None:
    """x' = x - tan(degrees) y, from the centre."""
    warp(frames, matrix=((1, math.tan(math.radians(degrees))), (0, 1)), move=(0, 0))


def shear_y(frames: Tensor, *, degrees: float) -> None:
    """y' = y + tan(degrees) x, from the centre."""
    warp(frames, matrix=((1, 0), (-math.tan(math.radians(degrees)), 1)), move=(0, 0))


def translate(frames: Tensor, *, x: float = 0.0, y: float = 0.0) -> None:
    """By shares of the width and of the height, to the right and down."""
    warp(frames, matrix=((1, 0), (0, 1)), move=(-x, -y))


def rotate(frames: Tensor, *, degrees: float) -> None:
    """Clockwise."""
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    warp(frames, matrix=((cosine, sine), (-sine, cosine)), move=(0, 0))


def cutout(frames: Tensor, *, x: float, y: float) -> None:
    """A grey square around (x, y), in shares of width and height; its side is 0.18 of the height."""
    height, width = frames.shape[2:]
    half = SHARE_MOVED * height / 2
    top, bottom = (max(0, int(y * height + side)) for side in (-half, half))
    left, right = (max(0, int(x * width + side)) for side in (-half, half))
    frames[:, :, top:bottom, left:right] = 128


# -------------------------------------------------------------------------------------------------------- tables of 256


def look_up(frames: Tensor, table: np.ndarray) -> None:
    """(..., H, W) uint8: every value v becomes table[v], one table or (..., 256) of them."""
    tables = np.broadcast_to(table.astype(np.uint8), (*frames.shape[:-2], 256)).reshape(-1, 256)
    flat = frames.numpy()
    for place, one in zip(np.ndindex(*frames.shape[:-2]), tables, strict=True):
        plane = flat[place]
        # The quickest look-up that Python has: it makes no indices of eight bytes.
        plane[...] = np.frombuffer(plane.tobytes().translate(one.tobytes()), np.uint8).reshape(plane.shape)


def posterize(frames: Tensor) -> None:
    """Only the three highest bits."""
    # 3 = int(4 * 0.9) bits at level 0.9.
    frames.bitwise_and_(0b11100000)


def solarize(frames: Tensor) -> None:
    """Bright values turn dark."""
    values = np.arange(256)
    look_up(frames, np.where(values >= SOLARIZED_FROM, 255 - values, values))


def invert(frames: Tensor) -> None:
    """255 - v."""
    frames.bitwise_not_()


def enhance_brightness(frames: Tensor) -> None:
    """Away from black."""
    look_up(frames, _away_from(torch.zeros(1), torch.arange(256)).numpy())


def enhance_contrast(frames: Tensor) -> None:
    """Away from the mean grey of each frame."""
    means = [int(grey(frame).double().mean() + 0.5) for frame in frames.unbind(1)]
    look_up(frames, _away_from(torch.tensor(means)[:, None], torch.arange(256)).numpy())


def autocontrast(frames: Tensor) -> None:
    """Each channel of each frame from 0 to 255."""
    flat = frames.flatten(2)
    low, high = (bound.double().numpy()[..., None] for bound in (flat.amin(2), flat.amax(2)))
    values, scale = np.arange(256.0), 255.0 / np.maximum(high - low, 1)
    # In Pillow's order, an offset of -low * scale: another way to write it differs in the last bit, and trunc shows
    # that.
    stretched = np.trunc(values * scale - low * scale).clip(0, 255)
    look_up(frames, np.where(high > low, stretched, values))


def equalize(frames: Tensor) -> None:
    """Each channel of each frame with all levels about equally often."""
    planes = frames.flatten(2).flatten(0, 1)
    counts = np.stack([torch.bincount(plane, minlength=256).numpy() for plane in planes])
    last = counts[np.arange(len(counts)), 255 - (counts[:, ::-1] > 0).argmax(1)]
    # Pillow leaves the highest level that occurs out of the count, and a channel with a step of 0 as it is.
    step = ((planes.shape[1] - last) // 255)[:, None]
    spread = (step // 2 + counts.cumsum(1) - counts) // np.maximum(step, 1)
    tables = np.where(step > 0, spread.clip(0, 255), np.arange(256))
    look_up(frames, tables.reshape(*frames.shape[:2], 256))


# -------------------------------------------------------------------------------------------------------- other colours


def enhance_color(frames: Tensor) -> None:
    """Away from the grey of each pixel."""
    for frame in frames.unbind(1):
        frame.copy_(_away_from(grey(frame), frame))


def enhance_sharpness(frames: Tensor) -> None:
    """Away from the mean of 3 x 3 pixels, where the middle counts five times; the border stays."""
    for frame in frames.unbind(1):
        wide = frame.short()
        rows = wide[:, :-2] + wide[:, 1:-1] + wide[:, 2:]
        # Nine pixels, of which the middle is counted five times: 1 here and 4 more. Of sum / 13, rounded, the integers
        # below are the exact form.
        total = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:] + 4 * wide[:, 1:-1, 1:-1]
        inside = frame[:, 1:-1, 1:-1]
        inside.copy_(_away_from((2 * total + 13) // 26, inside))


def _away_from(dull: Tensor, values: Tensor) -> Tensor:
    """Pillow's blend beyond the values, in its float32, cut to a whole level."""
    dull = dull.float()
    return values.sub(dull).mul_(FACTOR).add_(dull).clamp_(0, 255).to(torch.uint8)


# --------------------------------------------------------------------------------------------------------------- choice


def _plain(operation: Operation) -> Callable[[int, np.random.Generator], Operation]:
    return lambda sign, generator: operation


def _draw_cutout(sign: int, generator: np.random.Generator) -> Operation:
    return partial(cutout, x=generator.random(), y=generator.random())


OPERATIONS: dict[str, Callable[[int, np.random.Generator], Operation]] = {
    "ShearX": lambda sign, _: partial(shear_x, degrees=sign * DEGREES_SHEARED),
    "ShearY": lambda sign, _: partial(shear_y, degrees=sign * DEGREES_SHEARED),
    "TranslateX": lambda sign, _: partial(translate, x=sign * SHARE_MOVED),
    "TranslateY": lambda sign, _: partial(translate, y=sign * SHARE_MOVED),
    "Rotate": lambda sign, _: partial(rotate, degrees=sign * DEGREES_TURNED),
    "Posterize": _plain(posterize),
    "Solarize": _plain(solarize),
    "EnhanceColor": _plain(enhance_color),
    "EnhanceContrast": _plain(enhance_contrast),
    "EnhanceBrightness": _plain(enhance_brightness),
    "EnhanceSharpness": _plain(enhance_sharpness),
    "Autocontrast": _plain(autocontrast),
    "Equalize": _plain(equalize),
    "Invert": _plain(invert),
    "Cutout": _draw_cutout,
}
"""Name -> (sign, generator) -> the operation, in the order in which two of them are applied."""
