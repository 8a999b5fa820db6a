"""`re2tal rewire`: which parts of a backbone become reversible, which do not and why, and the memory that saves."""

from __future__ import annotations

from typing import Annotated

import tyro

from re2tal.options import COUNT, check
from re2tal.rewire import RewiringConfig
from re2tal.runs.rewiring import rewire_and_count


def rewire(
    model: Annotated[str, tyro.conf.Positional],
    *,
    weights: str | None = None,
    wiring: Annotated[RewiringConfig, tyro.conf.arg(name="")],
    frames: int | None = None,
    size: tuple[int, int] | None = None,
) -> None:
    """Rewire a backbone, and print what was rewired, what was left alone and why, and the memory it needs.

    Args:
        model: name of a backbone, such as videomae_base; or any picture or video model of the transformers library, by
            its folder or as OWNER/NAME
        weights: a hub name, folder or file, checked and loaded first; a model of the library brings its own
        wiring: how it is rewired
        frames: frames of the clip to count memory for; what the network was trained on by default
        size: rows and columns of these frames; what the network was trained on by default
    """
    check("--frames", frames, COUNT)
    check("--size", size, COUNT)
    print(rewire_and_count(model, wiring, weights=weights, frames=frames, size=size))
