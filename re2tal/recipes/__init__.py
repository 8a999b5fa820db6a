"""Published settings, and settings put together from their parts: RECIPES names them, `find_recipe` builds any.

parts        data set x backbone x localizer, on videos or features; RECIPES lists the useful ones, all can be named
presets      the demo, and the runs that parts start from: Re2TAL's, and ActionFormer's release
adatad       AdaTAD's
named        other localizers on features, and a limit of memory
recognition  recognizers: Kinetics, and the demo's clips
about        ranks, published figures, differences from the source
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from difflib import get_close_matches
from functools import partial
from itertools import product

from re2tal.config import AnyRun, RecognitionConfig, RunConfig
from re2tal.recipes.about import ranks_of
from re2tal.recipes.adatad import ADATAD
from re2tal.recipes.named import NAMED
from re2tal.recipes.parts import BACKBONE_PARTS, DATA_PARTS, LOCALIZER_PARTS, compose, composed_name
from re2tal.recipes.recognition import RECOGNITION

__all__ = ["RECIPES", "find_recipe"]

Recipe = Callable[[], RunConfig] | Callable[[], RecognitionConfig]

_COMPOSED: dict[str, Callable[[], RunConfig]] = {
    composed_name(*parts, features=features): partial(compose, *parts, features=features)
    for *parts, features in product(DATA_PARTS, BACKBONE_PARTS, LOCALIZER_PARTS, (False, True))
}
_SMALL = ("re2swin_tiny", "swin_tiny", "re2slowfast_r101", "slowfast_r101")
_LARGE = tuple(name for name in BACKBONE_PARTS if name not in _SMALL)
_LISTED = [
    *product(("thumos14", "activitynet"), _SMALL, ("actionformer", "vsgn"), (False, True)),
    *product(("thumos14", "activitynet"), _LARGE, ("actionformer",), (False,)),
    *product(tuple(DATA_PARTS)[2:], ("re2swin_tiny",), ("actionformer",), (False, True)),
]

RECIPES: dict[str, Recipe] = {
    **{name: _COMPOSED[name] for *parts, features in _LISTED for name in [composed_name(*parts, features=features)]},
    **NAMED,
    **ADATAD,
    **RECOGNITION,
}


def find_recipe(name: str) -> AnyRun:
    """The recipe of that name, listed or put together; ValueError with the known names otherwise."""
    build = RECIPES.get(name) or _COMPOSED.get(name)
    if build is None:
        near = get_close_matches(name, RECIPES | _COMPOSED, n=4, cutoff=0.0)
        raise ValueError(
            f"unknown recipe {name!r}; nearest: {near}; `re2tal recipes` lists {len(RECIPES)}. Any data set of "
            f"{list(DATA_PARTS)} goes with any backbone of {list(BACKBONE_PARTS)}, then nothing or one of "
            f"{list(LOCALIZER_PARTS)[1:]}, then nothing or features"
        )
    run = build()
    clips = ranks_of(name, run) * run.engine.batch_size * run.engine.gradient_accumulation
    return replace(run, name=name, optimizer=replace(run.optimizer, made_for_clips=clips))
