"""The peak of a step, as the drawing in `planning.search` says it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from re2tal.planning.search import Ground, Option


def peak_of(ground: Ground, options: Sequence[Option]) -> int:
    """Most bytes alive at once with one option for every stage."""
    kept = list(accumulate((option.kept for option in options), initial=0))
    in_stages = [
        max(ground.forward[s] + kept[s] + option.forward, ground.backward[s] + kept[s + 1] + option.backward)
        for s, option in enumerate(options)
    ]
    return max(ground.before, ground.between + kept[-1], *in_stages)
