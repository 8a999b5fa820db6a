"""Augmentations beside Pillow, float64 and hand-worked pictures; tests/parity has those of mmaction2 and imgaug."""

from __future__ import annotations

import colorsys
import math
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops, ImageEnhance, ImageFilter, ImageOps

from re2tal.data.streaming import imgaug
from re2tal.data.streaming.augmentation import AUGMENTATIONS
from re2tal.data.streaming.color_jitter import ColorJitter, draw_color_jitter, from_hsv, to_hsv
from re2tal.data.streaming.imgaug import OPERATIONS, draw_imgaug

SIZES = [(224, 224), (17, 45), (3, 3), (1, 5)]


def pictures(height: int, width: int, *, count: int = 3, seed: int = 0) -> np.ndarray:
    """(T, H, W, 3): noise of few levels, a dim gradient, and one colour."""
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, 256, (height, width, 3)) // 40 * 37
    gradient = np.linspace(30, 180, height * width).reshape(height, width, 1).repeat(3, 2) + rng.integers(0, 9, 3)
    flat = np.full((height, width, 3), rng.integers(0, 256, 3))
    return np.stack([noise, gradient, flat][:count]).astype(np.uint8)


def changed(frames: np.ndarray, operation: imgaug.Operation) -> np.ndarray:
    clip = torch.from_numpy(frames).permute(3, 0, 1, 2).contiguous()
    operation(clip)
    return clip.permute(1, 2, 3, 0).numpy()


def sharpened(picture: Image.Image) -> Image.Image:
    smooth = picture.filter(ImageFilter.SMOOTH)
    return Image.blend(smooth, picture, 1.72)


PILLOW = {
    "Posterize": lambda picture: ImageOps.posterize(picture, 3),
    "Solarize": lambda picture: ImageOps.solarize(picture, 230),
    "EnhanceColor": lambda picture: ImageEnhance.Color(picture).enhance(1.72),
    "EnhanceContrast": lambda picture: ImageEnhance.Contrast(picture).enhance(1.72),
    "EnhanceBrightness": lambda picture: ImageEnhance.Brightness(picture).enhance(1.72),
    "EnhanceSharpness": sharpened,
    "Autocontrast": ImageOps.autocontrast,
    "Equalize": ImageOps.equalize,
    "Invert": ImageChops.invert,
}


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", PILLOW)
def test_colours_change_to_pillows_bits(name, size):
    frames = pictures(*size)
    found = changed(frames, OPERATIONS[name](1, np.random.default_rng(0)))
    wanted = np.stack([np.asarray(PILLOW[name](Image.fromarray(frame))) for frame in frames])
    assert np.array_equal(found, wanted)


def bilinear(frame: np.ndarray, places: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """(H, W, 3) float64 of what lies at x and y, black outside."""
    padded = np.pad(frame.astype(float), ((1, 1), (1, 1), (0, 0)))
    x, y = (np.clip(place + 1, 0, length + 1) for place, length in zip(places, frame.shape[1::-1], strict=True))
    left, top = np.minimum(np.floor(x), frame.shape[1]).astype(int), np.minimum(np.floor(y), frame.shape[0]).astype(int)
    x, y = (x - left)[..., None], (y - top)[..., None]
    above = padded[top, left] * (1 - x) + padded[top, left + 1] * x
    below = padded[top + 1, left] * (1 - x) + padded[top + 1, left + 1] * x
    return above * (1 - y) + below * y


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name", ["ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"])
def test_geometry_is_bilinear_interpolation_of_the_inverse_map(name, sign):
    height, width = 32, 50
    rng = np.random.default_rng(1)
    frame = np.kron(rng.integers(0, 256, (4, 5, 3)), np.ones((8, 10, 1))).astype(np.uint8)
    y, x = np.mgrid[:height, :width].astype(float)
    u, v = x - 24.5, y - 15.5
    shear, turn = math.tan(math.radians(sign * 15.471)), math.radians(sign * 27)
    places = {
        "ShearX": (x + shear * v, y),
        "ShearY": (x, y - shear * u),
        "TranslateX": (x - sign * 0.18 * width, y),
        "TranslateY": (x, y - sign * 0.18 * height),
        "Rotate": (math.cos(turn) * u + math.sin(turn) * v + 24.5, math.cos(turn) * v - math.sin(turn) * u + 15.5),
    }[name]
    found = changed(frame[None], OPERATIONS[name](sign, rng))[0]
    # Places are counted in 1/32 pixels: at an edge of d levels up to d / 64 off, per axis.
    assert np.abs(found - bilinear(frame, places)).max() <= 2 * 255 / 64 + 0.5
    assert np.abs(found - bilinear(frame, places)).mean() < 0.6


def test_a_hand_worked_move_and_turn():
    frame = np.zeros((1, 9, 9, 3), np.uint8)
    frame[0, 4, 6] = 200
    moved = changed(frame, OPERATIONS["TranslateX"](1, np.random.default_rng(0)))[0, :, :, 0]
    assert moved[4, 7:9].tolist() == [75, 125]  # 0.18 of 9 pixels are 1.62
    turned = changed(frame, OPERATIONS["Rotate"](1, np.random.default_rng(0)))[0, :, :, 0]
    assert turned.argmax() == 5 * 9 + 6  # clockwise on the screen, where y points down


@pytest.mark.parametrize(
    ("x", "y", "rows", "columns"), [(0.5, 0.5, (41, 59), (141, 159)), (1.0, 0.0, (0, 9), (291, 300))]
)
def test_cutout_is_a_grey_square_cut_at_the_border(x, y, rows, columns):
    found = changed(np.full((2, 100, 300, 3), 7, np.uint8), partial(imgaug.cutout, x=x, y=y))
    wanted = np.full((2, 100, 300, 3), 7, np.uint8)
    wanted[:, rows[0] : rows[1], columns[0] : columns[1]] = 128
    assert np.array_equal(found, wanted)


def test_two_different_operations_are_drawn_evenly_and_keep_their_order():
    generator = np.random.default_rng(0)
    clip = torch.zeros(3, 1, 8, 8, dtype=torch.uint8)
    kinds, pairs = Counter(), set()
    for _ in range(3000):
        first, second = (
            getattr(operation, "func", operation).__name__ + str(getattr(operation, "keywords", {}).keys())
            for operation in draw_imgaug(generator)
        )
        kinds.update((first, second))
        pairs.add((first, second))
    assert len(kinds) == 15
    assert all(0.11 < count / 3000 < 0.16 for count in kinds.values())  # 2 of 15, and four deviations
    assert len(pairs) == 105, "a pair came in both orders, or an operation twice"
    for operation in draw_imgaug(generator):
        operation(clip)


def test_geometric_operations_are_drawn_to_both_sides():
    generator = np.random.default_rng(0)
    degrees = [
        operation.keywords["degrees"]
        for _ in range(600)
        for operation in draw_imgaug(generator)
        if getattr(operation, "func", None) is imgaug.rotate
    ]
    assert set(degrees) == {27.0, -27.0}
    assert 0.3 < degrees.count(27.0) / len(degrees) < 0.7


A, B, C, D, E = (10, 100, 200), (250, 128, 3), (60, 60, 60), (231, 230, 229), (255, 0, 128)


@pytest.mark.parametrize(
    ("jitter", "wanted"),
    [
        (ColorJitter(1.3, 1, 1, 0, (0, 1, 2, 3)), [(13, 130, 255), (255, 166, 3), (255, 255, 255)]),
        (ColorJitter(1, 0.7, 1, 0, (0, 1, 2, 3)), [(43, 106, 176), (211, 126, 39), (198, 197, 197)]),
        (ColorJitter(1, 1, 1.4, 0, (0, 1, 2, 3)), [(0, 106, 246), (255, 119, 0), (231, 229, 228)]),
        (ColorJitter(1, 1, 1, 0.08, (0, 1, 2, 3)), [(48, 10, 200), (209, 250, 3), (231, 231, 229)]),
        (ColorJitter(1, 1, 1, -0.08, (0, 1, 2, 3)), [(10, 200, 175), (250, 3, 44), (231, 229, 229)]),
    ],
    ids=["brightness", "contrast", "saturation", "hue", "hue back"],
)
def test_hand_worked_jitters(jitter, wanted):
    found = changed(np.array([[[A, B, C, D, E]]], np.uint8), jitter)[0, 0]
    # The table was made with vectors of 32 pixels, which cut what a row's end rounds.
    assert np.abs(found[[0, 1, 3]].astype(int) - wanted).max() <= (1 if jitter.hue else 0)


def test_hsv_is_that_of_colorsys_within_its_steps():
    frame = torch.randint(0, 256, (3, 20, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    hue, saturation, value = to_hsv(frame)
    exact = np.array([colorsys.rgb_to_hsv(*(pixel / 255).tolist()) for pixel in frame.flatten(1).T.double()])
    turn = np.abs(hue.flatten().numpy() - exact[:, 0] * 180)
    assert np.minimum(turn, 180 - turn).max() <= 0.6
    assert np.abs(saturation.flatten().numpy() - exact[:, 1] * 255).max() <= 0.51
    assert np.array_equal(value.flatten().numpy(), np.rint(exact[:, 2] * 255))
    back = from_hsv(hue, saturation, value)
    shares = np.stack([hue / 180, saturation / 255, value / 255]).reshape(3, -1).astype(float).T
    exact = [colorsys.hsv_to_rgb(*share) for share in shares.tolist()]
    assert np.abs(back.flatten(1).T.numpy() - np.floor(np.array(exact) * 255 + 1e-4)).max() <= 1


def test_jitters_are_drawn_within_their_ranges_and_in_every_order():
    generator = np.random.default_rng(0)
    draws = [draw_color_jitter(generator) for _ in range(1000)]
    factors = np.array([(d.brightness, d.contrast, d.saturation, d.hue) for d in draws])
    assert np.abs(factors.min(0) - (0.5, 0.5, 0.5, -0.1)).max() < 0.01
    assert np.abs(factors.max(0) - (1.5, 1.5, 1.5, 0.1)).max() < 0.01
    assert len({d.order for d in draws}) == 24


def test_the_generator_decides_everything_and_equal_frames_stay_equal():
    frame = pictures(40, 56, count=1)
    for seed in range(30):
        clips = []
        for _ in range(2):
            clip = torch.from_numpy(frame.repeat(3, 0)).permute(3, 0, 1, 2).contiguous()
            for operation in AUGMENTATIONS["opentad"](np.random.default_rng(seed)):
                operation(clip)
            clips.append(clip)
        assert torch.equal(*clips)
        assert torch.equal(clips[0][:, 0], clips[0][:, 2])


def test_a_part_of_a_clip_is_changed_in_place_and_the_rest_is_not():
    for name, make in OPERATIONS.items():
        clip = torch.from_numpy(pictures(24, 40)).permute(3, 0, 1, 2).contiguous()
        alone, before = clip[:, :2].clone(), clip[:, 2].clone()
        make(1, np.random.default_rng(0))(alone)
        make(1, np.random.default_rng(0))(clip[:, :2])
        assert torch.equal(clip[:, :2], alone), name
        assert torch.equal(clip[:, 2], before), name
