"""The entries of an annotation file, one by one: what fits becomes a record, all that does not is collected."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from re2tal.data.building.labels import folded, is_label
from re2tal.strict_json import finite_number
from re2tal.structures import AMBIGUOUS, Action, VideoRecord
from re2tal.video_ids import composed, id_fault, plain_id

MAX_SHOWN = 20
SUBSET_NAME = re.compile(r"[a-z0-9_-]{1,40}")


UNKNOWN_SECONDS = 1e7
"""Stands in for the length of a video that cannot be measured, until the video is left out for that."""


def duration_tolerance(duration_seconds: float) -> float:
    """How far two durations of one video may differ: one second, or 2 % of a long video.

    Published files need it: they were made from other copies of the videos, and round.
    """
    return max(1.0, 0.02 * duration_seconds)


def misfit(seconds: float, annotated_seconds: float) -> str:
    """Why a video that lasts so long is not the one that was annotated; nothing where it may be."""
    if annotated_seconds == UNKNOWN_SECONDS:
        return "the annotation file does not say how long it lasts, and it could not be measured; write its duration"
    if abs(seconds - annotated_seconds) <= duration_tolerance(annotated_seconds):
        return ""
    return f"it lasts {seconds:.2f} s, the annotation file says {annotated_seconds:.2f} s"


def raise_together(path: Path | str, problems: Sequence[str], *, hint: str = "") -> None:
    """Raise one ValueError that lists all problems of `path`, if there are any; `hint` ends the message."""
    if len(problems) == 1:
        raise ValueError(f"{path}: {problems[0]}" + (f"; {hint}" if hint else ""))
    if problems:
        more = f"\n  and {len(problems) - MAX_SHOWN} more" if len(problems) > MAX_SHOWN else ""
        shown = "".join(f"\n  {problem}" for problem in problems[:MAX_SHOWN])
        raise ValueError(f"{path} has {len(problems)} problems:{shown}{more}" + (f"\n{hint}" if hint else ""))


@dataclass(slots=True)
class EntryReader:
    """Turns entries into records and collects the problems."""

    classes: frozenset[str] | None
    drop_invalid: bool
    duration_of: Callable[[str], float] | None
    replaced: Mapping[str, str]
    problems: list[str] = field(default_factory=list)
    unknown_label: bool = False
    num_ambiguous: int = 0
    num_clipped: int = 0
    num_dropped: int = 0
    num_unknown: int = 0

    def notes(self) -> Iterator[str]:
        """What was counted, a sentence each."""
        for count, what in (
            (self.num_ambiguous, 'segments labelled "Ambiguous" skipped'),
            (self.num_clipped, "segments that end a little after their video cut to its end"),
            (self.num_dropped, "invalid segments dropped"),
            (self.num_unknown, "entries have no annotations: videos of which no action is known"),
        ):
            if count:
                yield f"{count} {what}"

    def hint(self) -> str:
        """Lists the classes if a label was not among them; otherwise empty."""
        if not self.unknown_label:
            return ""
        names = sorted(self.classes or ())
        more = f" and {len(names) - 30} more" if len(names) > 30 else ""
        return f"the classes are {', '.join(names[:30])}{more}"

    def videos(self, database: dict[str, Any]) -> Iterator[VideoRecord]:
        """The entries that fit."""
        keys: dict[str, str] = {}
        for key, entry in database.items():
            video_id = plain_id(key)
            try:
                # Two Unicode forms of one name are one file on some systems, and two on others.
                if (other := keys.setdefault(composed(video_id), key)) != key:
                    raise _Problem("id", key, f"{other!r} is the same video; keep one entry")
                yield self._video(video_id, entry)
            except _Problem as problem:
                self.problems.append(f"database.{_shown(key)}: {problem}")

    def _video(self, video_id: str, entry: Any) -> VideoRecord:
        if fault := id_fault(video_id):
            raise _Problem("id", video_id, fault)
        if not isinstance(entry, dict):
            raise _Problem("entry", entry, "give an object with subset, duration and annotations")
        subset, annotations = entry.get("subset"), entry.get("annotations")
        if not isinstance(subset, str) or not SUBSET_NAME.fullmatch(subset.lower()):
            how = "in letters a to z, digits, _ and -" if subset else "or use `re2tal annotations convert`"
            raise _Problem("subset", subset, f'give a name such as "training", {how}')
        if "annotations" not in entry:
            self.num_unknown += 1
            annotations = []
        if not isinstance(annotations, list):
            raise _Problem("annotations", annotations, "give a list, empty where nothing happens")
        duration = self._duration(video_id, entry)
        return VideoRecord(
            video_id=video_id,
            subset=subset.lower(),
            duration_seconds=duration,
            actions=tuple(self._actions(f"database.{_shown(video_id)}", annotations, duration)),
        )

    def _duration(self, video_id: str, entry: dict[str, Any]) -> float:
        given = entry.get("duration")
        duration = finite_number(given)
        if duration is not None and duration > 0:
            return duration
        if given is not None and duration != 0:  # 0 stands for an unknown length in many exports
            raise _Problem("duration", given, "give the video's length in seconds")
        frames, fps = finite_number(entry.get("frame")), finite_number(entry.get("fps"))
        if frames is not None and fps is not None and frames > 0 and fps > 0:
            return frames / fps
        if self.duration_of is None:
            raise _Problem("duration", given, "give the video's length in seconds")
        try:
            return self.duration_of(video_id)
        except ValueError as error:
            raise _Problem("duration", given, f"it is not given, and cannot be measured either: {error}") from None

    def _actions(self, where: str, annotations: list[Any], duration: float) -> Iterator[Action]:
        for number, item in enumerate(annotations):
            try:
                label = self._label(item)
                # Unless a class list has it: then it is a class like others.
                if label == AMBIGUOUS and AMBIGUOUS not in (self.classes or ()):
                    self.num_ambiguous += 1
                elif (segment := self._segment(item.get("segment"), duration)) is not None:
                    yield Action(*segment, label)
            except _Problem as problem:
                self.problems.append(f"{where}.annotations[{number}]: {problem}")

    def _label(self, item: Any) -> str:
        if not isinstance(item, dict):
            raise _Problem("annotation", item, "give an object with segment and label")
        label = item.get("label")
        label = self.replaced.get(label, label) if isinstance(label, str) else label
        if not is_label(label):
            raise _Problem("label", label, "give a class name of 1 to 200 printable characters")
        if self.classes is not None and label not in self.classes and label != AMBIGUOUS:
            if twin := {folded(name): name for name in self.classes}.get(folded(label)):
                raise _Problem("label", label, f"the class is spelled {twin!r}; correct it, or use --fix-labels")
            self.unknown_label = True
            raise _Problem("label", label, "it is not among the classes; correct it, or choose another --dataset")
        return label

    def _segment(self, segment: Any, duration: float) -> tuple[float, float] | None:
        times = [finite_number(value) for value in segment] if isinstance(segment, list) else []
        if len(times) != 2 or times[0] is None or times[1] is None:
            raise _Problem(
                "segment", segment, "give [start, end] in seconds; `re2tal annotations convert` reads clock times"
            )
        start, end = times[0], times[1]
        if fault := _fault(start, end, duration):
            if not self.drop_invalid:
                raise _Problem("segment", segment, f"{fault}; correct it, or use --invalid-segments drop")
            self.num_dropped += 1
            return None
        self.num_clipped += end > duration
        return start, min(end, duration)


def _shown(key: str) -> str:
    return key[:100] if key.isprintable() else ascii(key[:100])


class _Problem(ValueError):
    """One key whose value does not fit."""

    def __init__(self, key: str, value: Any, remedy: str) -> None:
        super().__init__(f"{key} is {repr(value)[:120]}: {remedy}")


def _fault(start: float, end: float, duration: float) -> str:
    if start < 0:
        return "it starts before the video"
    if end <= start:
        return "it is reversed" if end < start else "it lasts no time"
    # Tolerated as durations are: the times were written for another copy of the video.
    if start >= duration or end > duration + duration_tolerance(duration):
        return f"the video lasts {duration:g} s"
    return ""
