"""`re2tal classify`: what trimmed videos show, by a trained recognizer, and how often it is right."""

from __future__ import annotations

from typing import Annotated

import tyro

from re2tal.cli.say import say_left_out
from re2tal.runs import classification
from re2tal.runs.exit_status import SOME_LEFT_OUT


def classify(options: Annotated[classification.ClassificationOptions, tyro.conf.arg(name="")]) -> int:
    """Write the probabilities of all classes to a JSON that `re2tal evaluate` and `re2tal detect --video-classes` read.

    Exit status 1 if some videos could not be used.
    """
    done = classification.classify(options)
    say_left_out(done.rejected)
    print(f"{done.about}{len(done.scores)} videos; {done.path}")
    return SOME_LEFT_OUT if done.rejected else 0
