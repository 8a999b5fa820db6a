"""Ground truth for scoring, taken from an annotation file as published evaluators take it.

    {"database": {video: {"subset": ..., "duration": ..., "annotations": [{"segment": [start, end], "label": ...}]}}}

`re2tal.data.building.annotations` reads the same files for training, and there refuses empty segments and clips those
that end after the video. A score must do neither: whether such truths count is the protocol's decision, and their
seconds are part of every published number. Segments labelled "Ambiguous" (THUMOS-14) are no truths, and are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from re2tal.strict_json import brief, finite_number, read_json
from re2tal.structures import AMBIGUOUS, Action, VideoRecord, find_subset

ANY_CLASS = "action"
"""The one label of class-agnostic scores, as class-agnostic detectors write it."""


def read_ground_truth(path: Path | str, *, subset: str) -> list[VideoRecord]:
    """The videos of `subset`, with all their segments, in the file's order.

    A subset is found in any case and by its other name ("val", "validation"). Where a video has no duration, or 0, the
    end of its last action stands in. Raises FileNotFoundError, and ValueError naming file, key and value for anything
    that is not an ActivityNet layout, and for a subset without videos.
    """
    database = _database(path)
    for video_id, entry in database.items():
        if not isinstance(entry, dict) or not isinstance(entry.get("subset"), str):
            where = f"{path}: database[{video_id!r}]"
            raise ValueError(f'{where} is {brief(entry)}; it needs "subset", a name, and "annotations", a list')
    subsets = {entry["subset"] for entry in database.values()}
    found = find_subset(subset, sorted(subsets))
    records = []
    for video_id, entry in database.items():
        # A file may spell one subset in two ways; all its videos count.
        if found is not None and entry["subset"].lower() == found.lower():
            where = f"{path}: database[{video_id!r}]"
            actions = tuple(_actions(where, entry.get("annotations")))
            end = max((action.end_seconds for action in actions), default=0.0)
            duration = _seconds(entry.get("duration", 0.0), f"{where}.duration")
            records.append(VideoRecord(video_id, subset, duration or end, actions))
    if not records:
        raise ValueError(f"{path} has no video of subset {subset!r}; it has {sorted(subsets)}")
    return records


def read_subsets(path: Path | str) -> dict[str, str]:
    """The subset of every video in a file that `read_ground_truth` accepts."""
    return {video_id: entry["subset"] for video_id, entry in _database(path).items()}


def without_duration(path: Path | str) -> frozenset[str]:
    """The videos of such a file whose duration is not known, so that `read_ground_truth` gives a stand-in."""
    where = f"{path}: database"
    return frozenset(
        video_id
        for video_id, entry in _database(path).items()
        if not _seconds(entry.get("duration", 0.0), f"{where}[{video_id!r}].duration")
    )


def _database(path: Path | str) -> dict[str, Any]:
    """Video id -> entry, from a file with or without the outer object."""
    document = read_json(path)
    database = document.get("database") if isinstance(document, dict) else None
    if database is None and isinstance(document, dict) and document:
        # Some packages leave "database" out; a results file, which is an object too, has no "subset".
        is_bare = all(isinstance(entry, dict) and "subset" in entry for entry in document.values())
        database = document if is_bare else None
    if not isinstance(database, dict):
        raise ValueError(f'{path} needs an object "database" that maps video ids to annotations, at the top')
    return database


def as_one_class(records: Sequence[VideoRecord]) -> list[VideoRecord]:
    """The same records with every action called `ANY_CLASS`: the truth for a class-agnostic detector."""
    return [
        replace(record, actions=tuple(replace(action, label=ANY_CLASS) for action in record.actions))
        for record in records
    ]


def _actions(where: str, annotations: Any) -> Iterator[Action]:
    if not isinstance(annotations, list):
        raise ValueError(f"{where}.annotations is {brief(annotations)}; it must be a list")
    for position, annotation in enumerate(annotations):
        here = f"{where}.annotations[{position}]"
        segment = annotation.get("segment") if isinstance(annotation, dict) else None
        label = annotation.get("label") if isinstance(annotation, dict) else None
        if not isinstance(segment, list) or len(segment) != 2 or not isinstance(label, str):
            raise ValueError(
                f'{here} is {brief(annotation)}; it needs "segment", [start, end] in seconds, and "label", a name'
            )
        if label != AMBIGUOUS:
            # Neither clipped nor put in order: see above.
            start, end = (_seconds(value, f"{here}.segment") for value in segment)
            yield Action(start, end, label)


def _seconds(value: Any, where: str) -> float:
    """Some files hold them as strings."""
    if (number := finite_number(value)) is None:
        raise ValueError(f"{where} holds {brief(value)}; give a finite number of seconds")
    return number
