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
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from re2tal.data.building.annotation_entries import EntryReader, raise_together
from re2tal.data.building.annotation_formats.formats import hint
from re2tal.data.building.labels import check_class_list, fold_notes, one_spelling, twin_problems
from re2tal.strict_json import finite_number, read_json
from re2tal.structures import SUBSETS, VideoRecord, find_subset
from re2tal.video_ids import plain_id


@dataclass(frozen=True, slots=True)
class Annotations:
    """What an annotation file says."""

    subsets: Mapping[str, tuple[VideoRecord, ...]]
    """Lower-case subset name -> its videos in the file's order."""
    classes: tuple[str, ...]
    """Class names; sorted, unless the caller gave them."""
    notes: tuple[str, ...] = ()
    """What was left out, changed, or is there twice: a sentence each, for people."""
    keys: Mapping[str, str] = field(default_factory=dict)
    """Video id -> its key in the file, where that has the suffix of a file: it tells which of two files is meant."""

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
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give a JSON list of video ids, or a text file with one per line")
    if path.suffix.lower() != ".json":
        try:
            lines = path.read_text(encoding="utf-8-sig").split("\n")  # some editors begin a file with a mark
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text: {error}; save it as UTF-8, one id per line") from None
        return frozenset(line.strip() for line in lines if line.strip())
    ids = read_json(path)
    if not isinstance(ids, list) or not all(isinstance(video_id, str) for video_id in ids):
        raise ValueError(f"{path} is not a JSON list of video ids; give one, or a text file with one id per line")
    return frozenset(ids)


def read_keys(path: Path) -> dict[str, str]:
    """Video id -> key of all entries of an annotation file, whatever else they hold."""
    return {plain_id(key): key for key in read_database(path)}


def read_frame_rates(path: Path) -> dict[str, float]:
    """Frames per second of the videos of an annotation file whose entries say them: "fps", or "frame" / "duration"."""
    rates = {}
    for key, entry in read_database(path).items():
        if not isinstance(entry, dict):
            continue
        fps, frames, seconds = (finite_number(entry.get(name)) for name in ("fps", "frame", "duration"))
        if fps is None and frames and seconds:
            fps = frames / seconds
        if fps and 0 < fps < math.inf:
            rates[plain_id(key)] = fps
    return rates


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
    class list and refuses other labels. `duration_of(video_id)` gives the seconds of a video whose entry has none, or
    UNKNOWN_SECONDS where the video will be left out for its file.
    Labels that differ by case, space or Unicode form are refused, or with `fix_labels` read as one.
    Raises ValueError naming the file, and for each problem the key, the value and the remedy.
    """
    database = read_database(path)
    known = check_class_list(classes)
    replaced = one_spelling(_raw_labels(database), classes=known or ()) if fix_labels else {}
    reader = EntryReader(known, invalid_segments == "drop", duration_of, replaced)
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
        notes=(*reader.notes(), *fold_notes(replaced), *repeated(_segments(records)), *alike_subsets(subsets)),
        keys={video_id: key for key in database if (video_id := plain_id(key)) != key},
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


def _segments(records: Iterable[VideoRecord]) -> Iterator[tuple[str, float, float, str]]:
    return ((one.video_id, a.start_seconds, a.end_seconds, a.label) for one in records for a in one.actions)


def alike_subsets(names: Iterable[str]) -> Iterator[str]:
    """A note about each subset that is there under two names: one is trained on or scored, and the other left."""
    known: dict[str, str] = {}
    for name in names:
        if (other := known.setdefault(SUBSETS.get(name.lower(), name.lower()), name)).lower() != name.lower():
            yield f"subsets {other!r} and {name!r} are one by their names, and stay two: give them one name"


def repeated(segments: Iterable[tuple[str, float, float, str]]) -> Iterator[str]:
    """A note about segments (video id, start and end in seconds, label) that are there more than once.

    They are kept, as scores count them.
    """
    found = [
        f"{video_id} {start:g} to {end:g} s {label!r}"
        for (video_id, start, end, label), count in Counter(segments).items()
        for _ in range(count - 1)
    ]
    if found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        yield f"{len(found)} segments are there twice, and are kept: {', '.join(found[:3])}{more}"
