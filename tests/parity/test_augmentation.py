"""Augmentation against mmaction2 1.2.0 with imgaug 0.4.0 and OpenCV 4.11.0, operation by operation."""

from __future__ import annotations

import json
import re
from functools import partial

import numpy as np
import pytest
import torch
from parity.vectors import cases, load

from re2tal.data.streaming.color_jitter import ColorJitter
from re2tal.data.streaming.imgaug import OPERATIONS, Operation, cutout
from re2tal.data.streaming.transforms import Box, crop_and_resize, normalise

SIZES = {"shear": 15.471, "percent": 0.18, "rotate": 27, "factor": 1.72, "threshold": 230.4, "nb_bits": 3, "cutoff": 0}
GEOMETRIC = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")
PARAMETERS = {name: json.loads(str(load(name).arrays["parameters_json"])) for name in cases("augmentation_")}
VECTORS = [
    (case, name)
    for case, parameters in PARAMETERS.items()
    for name in parameters
    if name.startswith(("imgaug_", "colorjitter_"))
]


def operations(case: str, name: str) -> list[Operation]:
    found = PARAMETERS[case][name]
    if name.startswith("colorjitter_"):
        return [ColorJitter(*(found[key] for key in "bcsh"), order=tuple(found["order"]))]
    if "drawn_in_order" in found:
        return [_named(*drawn, case=case) for drawn in found["drawn_in_order"]]
    kind = re.sub(r"^imgaug_|_plus$|_minus$|_\d$", "", name)
    return [_named(kind, found, case=case)]


def _named(kind: str, parameters: dict, *, case: str) -> Operation:
    if kind == "Cutout":
        height, width = load(case).arrays["clip"].shape[1:3]
        top, bottom, left, right = parameters["box_y0_y1_x0_x1"]
        half = SIZES["percent"] * height / 2
        return partial(cutout, x=_centre(left, right, width, half), y=_centre(top, bottom, height, half))
    for key in SIZES.keys() & parameters.keys():
        assert abs(parameters[key]) == pytest.approx(SIZES[key]), f"{kind}: ours has one {key}"
    size = next((parameters[key] for key in ("shear", "percent", "rotate") if key in parameters), 1)
    return OPERATIONS[kind](1 if size > 0 else -1, np.random.default_rng(0))


def _centre(first: int, last: int, length: int, half: float) -> float:
    """A share of the side at which a box of that size, cut to whole pixels and at the border, spans these pixels."""
    places = np.arange(0, length, 0.005)
    begins = np.maximum(0, (places - half).astype(int)) == first
    found = places[begins & (np.minimum(length, (places + half).astype(int)) == last)]
    return float(found[len(found) // 2]) / length


@pytest.mark.parametrize(("case", "name"), VECTORS, ids=[f"{case[-1]}-{name}" for case, name in VECTORS])
def test_operations_give_the_pixels_of_the_source(case: str, name: str) -> None:
    clip = load(case).tensor("clip").permute(3, 0, 1, 2).contiguous()
    for operation in operations(case, name):
        operation(clip)
    off = (clip.permute(1, 2, 3, 0).int() - load(case).tensor(name).int()).abs()
    if name.startswith("imgaug_default"):
        # What follows a warp may stretch its levels, by 1.72 or to the whole range; where it turns the mean grey over,
        # EnhanceContrast moves all pixels by one.
        assert off.float().mean() < 0.3
        assert (off > 8).float().mean() < 0.005
        return
    is_geometric = name.split("_")[1] in GEOMETRIC
    assert off.max() <= (3 if is_geometric else 1 if name.startswith("colorjitter_") else 0)


@pytest.mark.parametrize("case", PARAMETERS)
def test_crop_flip_and_normalisation(case: str) -> None:
    """Ours resizes with antialiasing, the source without, so resized pictures are not compared."""
    arrays, parameters = load(case), PARAMETERS[case]
    frames, (left, top, right, bottom) = arrays.tensor("clip"), parameters["centercrop"]["box"]
    size = parameters["centercrop"]["size"]
    cropped = arrays.tensor("centercrop").permute(3, 0, 1, 2)
    assert (right - left, bottom - top) == (size, size)
    box = Box(top, left, size, size)
    assert torch.equal(crop_and_resize(frames, box, size=size), cropped)
    flipped = arrays.tensor("flip")[:, top:bottom, -right : frames.shape[2] - left].permute(3, 0, 1, 2)
    assert torch.equal(crop_and_resize(frames, box, size=size, flip=True), flipped)
    ours = normalise(frames.permute(3, 0, 1, 2)[None])[0]
    torch.testing.assert_close(ours, arrays.tensor("normalize"), rtol=0, atol=1e-6)
