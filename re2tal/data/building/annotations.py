"""Annotation files: the ActivityNet layout and its THUMOS variants, read strictly.

    {"database": {id: {"subset": str, "duration": seconds, "annotations": [{"segment": [start, end], "label": str}]}}}

Variants that are recognised entry by entry: no `duration`, or 0, but `frame` and `fps` (or a caller who measures the
video), no `annotations` (a video of which nothing is known: test sets of OpenTAD), ids with the suffix of the file,
times written as strings, subset names in capitals, the label "Ambiguous" (skipped and counted: evaluation does not
know it). The outer object may be missing. All other keys are left alone. Sources: ActivityNet 1.3; the THUMOS14 files
of OpenTAD, ActionFormer, VSGN; OpenTAD's EPIC-Kitchens and Ego4D.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from re2tal.data.building.annotation_formats.formats import hint
from re2tal.data.building.labels import check_class_list, fold_notes, folded, is_label, one_spelling, twin_problems
from re2tal.strict_json import read_json
from re2tal.structures import AMBIGUOUS, Action, VideoRecord, find_subset
from re2tal.video_ids import composed, id_fault, plain_id

MAX_SHOWN = 20
SUBSET_NAME = re.compile(r"[a-z0-9_-]{1,40}")


@dataclass(frozen=True, slots=True)
class Annotations:
    """What an annotation file says."""

    subsets: Mapping[str, tuple[VideoRecord, ...]]
    """Lower-case subset name -> its videos in the file's order."""
    classes: tuple[str, ...]
    """Class names; sorted, unless the caller gave them."""
    num_ambiguous: int
    """Segments labelled "Ambiguous", left out."""
    num_clipped: int
    """Segments that ended a little after their video and now end with it."""
    num_dropped: int
    """Invalid segments left out because the caller said so."""
    notes: tuple[str, ...] = ()
    """What was left out, changed, or is there twice: a sentence each, for people."""

    def subset(self, name: str) -> tuple[VideoRecord, ...]:
        """The videos of a subset, in any case and by either of its names; ValueError where there are none."""
        if (found := find_subset(name, self.subsets)) is None:
            raise ValueError(f"no video belongs to subset {name!r}; the annotation file has {sorted(self.subsets)}")
        return self.subsets[found]


def read_video_ids(path: Path) -> frozenset[str]:
    """Video ids from a file: a JSON list, or, under any other suffix than .json, one per line.

    Raises FileNotFoundError, and ValueError naming the file for JSON that is no list of strings, or text that is not
    UTF-8.
    """
    if path.suffix != ".json":
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()  # some editors begin a file with a mark
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text: {error}; save it as UTF-8, one id per line") from None
        return frozenset(line.strip() for line in lines if line.strip())
    ids = read_json(path)
    if not isinstance(ids, list) or not all(isinstance(video_id, str) for video_id in ids):
        raise ValueError(f"{path} is not a JSON list of video ids; give one, or a text file with one id per line")
    return frozenset(ids)


def read_entry_ids(path: Path) -> list[str]:
    """The ids of all entries of an annotation file, whatever else they hold."""
    return [plain_id(key) for key in read_database(path)]


def read_frame_rates(path: Path) -> dict[str, float]:
    """Frames per second of the videos of an annotation file whose entries say them: "fps", or "frame" / "duration".

    Raises ValueError for a rate that is no number.
    """
    rates = {}
    for key, entry in read_database(path).items():
        video_id = plain_id(key)
        if not isinstance(entry, dict):
            continue
        try:
            fps = entry.get("fps")
            if fps is None and "frame" in entry and entry.get("duration"):
                fps = float(entry["frame"]) / float(entry["duration"])
            if fps is not None and 0 < float(fps) < math.inf:
                rates[video_id] = float(fps)
        except (TypeError, ValueError, ZeroDivisionError):
            given = {key: entry.get(key) for key in ("fps", "frame", "duration")}
            raise ValueError(f"{path}: {video_id}: {given} give no frame rate; correct them, or give --fps") from None
    return rates


def duration_tolerance(duration_seconds: float) -> float:
    """How far two durations of one video may differ: one second, or 2 % of a long video.

    Published files need it: they were made from other copies of the videos, and round.
    """
    return max(1.0, 0.02 * duration_seconds)


def read_annotations(
    path: Path,
    *,
    classes: Sequence[str] | None = None,
    invalid_segments: Literal["refuse", "drop"] = "refuse",
    duration_of: Callable[[str], float] | None = None,
    fix_labels: bool = False,
) -> Annotations:
    """Read an annotation file; all that is wrong in it is reported together.

    A segment that ends after the video by no more than `duration_tolerance` is clipped; one that is reversed, empty,
    negative or longer than that is refused, or dropped and counted if `invalid_segments` says so. `classes` fixes the
    class list and refuses other labels. `duration_of(video_id)` gives the seconds of a video whose entry has none.
    Labels that differ by case, space or Unicode form are refused, or with `fix_labels` read as one.
    Raises ValueError naming the file, and for each problem the key, the value and the remedy.
    """
    database = read_database(path)
    known = check_class_list(classes)
    replaced = one_spelling(_raw_labels(database), classes=known or ()) if fix_labels else {}
    reader = _Reader(known, invalid_segments == "drop", duration_of, replaced)
    records = list(reader.videos(database))
    labels = {action.label for record in records for action in record.actions}
    if not labels and not reader.problems:
        reader.problems.append("database: no video has an annotation; give the file that lists the actions")
    reader.problems += twin_problems(action.label for record in records for action in record.actions)
    raise_together(path, reader.problems, hint=reader.hint())
    subsets: dict[str, list[VideoRecord]] = {}
    for record in records:
        subsets.setdefault(record.subset, []).append(record)
    return Annotations(
        subsets={name: tuple(videos) for name, videos in subsets.items()},
        classes=tuple(sorted(labels)) if classes is None else tuple(classes),
        num_ambiguous=reader.num_ambiguous,
        num_clipped=reader.num_clipped,
        num_dropped=reader.num_dropped,
        notes=(*reader.notes(), *fold_notes(replaced), *_repeated(records)),
    )


def read_database(path: Path) -> dict[str, Any]:
    """Key -> entry, from a file with or without the outer object."""
    try:
        content = read_json(path)
    except ValueError as error:
        raise ValueError(f"{error}; {hint(path)}") from None
    database = content.get("database") if isinstance(content, dict) and "database" in content else content
    if isinstance(database, dict) and database and (database is not content or _is_bare(database)):
        return database
    raise ValueError(
        f'{path} has no "database" object with a video in it; wanted {{"database": {{id: {{"subset": ..., '
        f'"duration": seconds, "annotations": [{{"segment": [start, end], "label": ...}}]}}}}}}; {hint(path)}'
    )


def _is_bare(content: dict[str, Any]) -> bool:
    return all(isinstance(entry, dict) and "subset" in entry and "actions" not in entry for entry in content.values())


def _raw_labels(database: Mapping[str, Any]) -> Iterator[str]:
    """Every label that is a text, in entries that may be anything."""
    for entry in database.values():
        annotations = entry.get("annotations") if isinstance(entry, dict) else None
        for item in annotations if isinstance(annotations, list) else ():
            if isinstance(item, dict) and isinstance(label := item.get("label"), str):
                yield label


def _repeated(records: Sequence[VideoRecord]) -> Iterator[str]:
    """A note about segments that a video has more than once; they are kept, as scores count them."""
    found = [
        f"{record.video_id} {action.start_seconds:g} to {action.end_seconds:g} s {action.label!r}"
        for record in records
        for action, count in Counter(record.actions).items()
        for _ in range(count - 1)
    ]
    if found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        yield f"{len(found)} segments are there twice, and are kept: {', '.join(found[:3])}{more}"


def raise_together(path: Path | str, problems: Sequence[str], *, hint: str = "") -> None:
    """Raise one ValueError that lists all problems of `path`, if there are any; `hint` ends the message."""
    if len(problems) == 1:
        raise ValueError(f"{path}: {problems[0]}" + (f"; {hint}" if hint else ""))
    if problems:
        more = f"\n  and {len(problems) - MAX_SHOWN} more" if len(problems) > MAX_SHOWN else ""
        shown = "".join(f"\n  {problem}" for problem in problems[:MAX_SHOWN])
        raise ValueError(f"{path} has {len(problems)} problems:{shown}{more}" + (f"\n{hint}" if hint else ""))


@dataclass(slots=True)
class _Reader:
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
        keys: dict[str, str] = {}
        for key, entry in database.items():
            video_id = plain_id(key)
            try:
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
            raise _Problem(
                "subset",
                subset,
                'give a name such as "training", or use `re2tal annotations convert`',
            )
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
        duration = _number(given)
        if duration is not None and duration > 0:
            return duration
        if given is not None and duration != 0:  # 0 stands for an unknown length in many exports
            raise _Problem("duration", given, "give the video's length in seconds")
        frames, fps = _number(entry.get("frame")), _number(entry.get("fps"))
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
        times = [_number(value) for value in segment] if isinstance(segment, list) else []
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
    if start >= duration or end > duration + duration_tolerance(duration):
        return f"the video lasts {duration:g} s"
    return ""


def _number(value: Any) -> float | None:
    """A finite number, also one written as a string; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
