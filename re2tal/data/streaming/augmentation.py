"""What `data.clips.augmentation` names: changes of pixels that are drawn once per clip, in the worker, on uint8 frames.

    generator of (seed, epoch, video) -> box, mirror bit -> operations -> every frame of the clip alike

They change frames in place, before padding repeats the last one. Evaluation draws none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from re2tal.data.streaming.color_jitter import draw_color_jitter
from re2tal.data.streaming.imgaug import Operation, draw_imgaug

Augmentation = Literal["none", "opentad"]


def _opentad(generator: np.random.Generator) -> Sequence[Operation]:
    return [*draw_imgaug(generator), draw_color_jitter(generator)]


AUGMENTATIONS: dict[Augmentation, Callable[[np.random.Generator], Sequence[Operation]]] = {
    "none": lambda generator: (),
    "opentad": _opentad,
}
"""Name -> draws the operations of a clip, in their order."""
