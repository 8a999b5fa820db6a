"""Augmentation against mmaction2 1.2.0 with imgaug 0.4.0 and OpenCV 4.11.0, operation by operation."""

from __future__ import annotations

import json
import re
from functools import partial

import numpy as np
import pytest
from parity.vectors import cases, load

from re2tal.data.streaming.color_jitter import ColorJitter
from re2tal.data.streaming.imgaug import OPERATIONS, Operation, cutout

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
        x = parameters.get("centre_x_fraction", (left + right + 1) / 2 / width)  # both sides are cut to whole pixels
        return partial(cutout, x=x, y=parameters.get("centre_y_fraction", (top + bottom + 1) / 2 / height))
    size = next((parameters[key] for key in ("shear", "percent", "rotate") if key in parameters), 1)
    return OPERATIONS[kind](1 if size > 0 else -1, np.random.default_rng(0))


@pytest.mark.parametrize(("case", "name"), VECTORS, ids=[f"{case[-1]}-{name}" for case, name in VECTORS])
def test_operations_give_the_pixels_of_the_source(case: str, name: str) -> None:
    clip = load(case).tensor("clip").permute(3, 0, 1, 2).contiguous()
    for operation in operations(case, name):
        operation(clip)
    off = (clip.permute(1, 2, 3, 0).int() - load(case).tensor(name).int()).abs()
    if name.startswith("imgaug_default"):
        # What follows a warp may stretch its levels: by 1.72, or to the whole range.
        assert off.float().mean() < 0.1
        return
    is_geometric = name.split("_")[1] in GEOMETRIC
    assert off.max() <= (3 if is_geometric else 1 if name.startswith("colorjitter_") else 0)
