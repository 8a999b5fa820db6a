"""What a detector found in one video, as people and other programs are shown it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from re2tal.structures import Detections


@dataclass(frozen=True, slots=True)
class FoundAction:
    """An action that a detector found in a video."""

    label: str
    """Name of its class."""
    start_seconds: float
    """When it begins, from the start of the video."""
    end_seconds: float
    """When it ends."""
    score: float
    """How sure the detector is, from 0 to 1."""


@dataclass(frozen=True, slots=True)
class FoundInVideo:
    """The actions of one video, the surest first."""

    name: str
    """Of the video in results."""
    path: Path | None
    """Its file; None for one that came from shards."""
    duration_seconds: float
    detections: Detections
    classes: tuple[str, ...]

    @property
    def actions(self) -> list[FoundAction]:
        """The detections with their classes' names."""
        return found_actions(self.detections, self.classes)


def found_actions(detections: Detections, classes: Sequence[str]) -> list[FoundAction]:
    """Detections with the names of their classes, in their order."""
    rows = zip(detections.segments.tolist(), detections.scores.tolist(), detections.labels.tolist(), strict=True)
    return [FoundAction(classes[label], start, end, score) for (start, end), score, label in rows]


def milliseconds_of(action: FoundAction) -> tuple[int, int]:
    """Start and end; at least a millisecond apart, for programs that take what lasts no time for an error."""
    first, last = round(action.start_seconds * 1000), round(action.end_seconds * 1000)
    return first, max(last, first + 1)


def as_text(path: Path | str) -> str:
    """A path as text that any file can hold: bytes that are no UTF-8 become backslash escapes."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")
