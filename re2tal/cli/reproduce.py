"""`re2tal reproduce thumos14|activitynet`: a published result, from the data to a card that compares."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Annotated

import tyro

from re2tal.runs import reproduction
from re2tal.runs.exit_status import HUNG
from re2tal.runs.published import Target
from re2tal.training.watchdog import RanksLost


@dataclass(frozen=True, slots=True)
class Asked(reproduction.Reproduction):
    """What to reproduce, from which files."""

    dataset: tyro.conf.Positional[Target]
    """thumos14 or activitynet"""


def reproduce(asked: Annotated[Asked, tyro.conf.arg(name="")]) -> int:
    """Check data, weights and machine, train the published setting, score it, and compare it with what was published.

    Writes card.md and card.json into the run folder. Exit status 0 if nothing was wrong, 1 if something makes the
    comparison doubtful (each is named), 2 for wrong input.
    """
    try:
        return reproduction.reproduce(asked)
    # A status of its own: a scheduler may start this again with --resume.
    except RanksLost as error:
        print(f"re2tal: {error}", file=sys.stderr)
        return HUNG
