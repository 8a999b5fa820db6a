"""Detections as a results JSON in ActivityNet's layout, the file that every evaluator of the field reads.

    {"version": "VERSION 1.3",
     "results": {video: [{"segment": [start, end], "label": ..., "score": ...}, ...]},
     "external_data": {},
     "num_cut": {video: 12, ...}}

`num_cut`, which others leave out, says how many more detections of a video its limit cut, at most, where it cut any;
"made_with" which weights and options made them; a "note" what else a reader should know. Seconds and scores are written
with all their digits: rounding, as some programs do, makes ties and empty segments.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from re2tal.files import write_atomically
from re2tal.strict_json import brief, read_json
from re2tal.structures import Detections

VERSION = "VERSION 1.3"


@dataclass(frozen=True, slots=True)
class Results:
    """A results file: `predictions[video].labels` index `classes`, which are in order of first appearance."""

    predictions: dict[str, Detections]
    classes: tuple[str, ...]
    note: str | None = None
    """What its reader should know of it."""
    made_with: Mapping[str, Any] | None = None
    """Weights and options that made it, and how large the files of its videos are."""

    def of(self, video_id: str) -> Detections:
        """The predictions for a video; none if the file does not name it."""
        return self.predictions.get(video_id) or read_detections(video_id, [], {})


def write_results(
    path: Path | str,
    predictions: Mapping[str, Detections],
    classes: Sequence[str],
    *,
    note: str | None = None,
    made_with: Mapping[str, Any] | None = None,
) -> None:
    """Write detections to `path`, atomically; videos and detections keep their order. The others: see `Results`.

    Raises ValueError for a NaN or infinite number and for a label that is not an index into `classes`.
    """
    # One video a line, dumped one by one: a million predictions as dictionaries would take gigabytes.
    videos = ",\n".join(
        f"{json.dumps(video_id)}: {json.dumps(_rows(video_id, detections, classes), allow_nan=False)}"
        for video_id, detections in predictions.items()
    )
    # Empty, but required: the official evaluator refuses a file without this key.
    tail = '"external_data": {}' + (f', "note": {json.dumps(note)}' if note else "")
    tail += f', "made_with": {json.dumps(made_with)}' if made_with else ""
    # None is "unknown": said of some videos only, the file would claim that no limit cut the others.
    if None not in (cut := {video_id: one.num_cut for video_id, one in predictions.items()}).values():
        tail += f', "num_cut": {json.dumps({video_id: number for video_id, number in cut.items() if number})}'
    write_atomically(path, f'{{"version": "{VERSION}", "results": {{\n{videos}\n}}, {tail}}}\n')


def read_results(path: Path | str) -> Results:
    """Read a results JSON, strictly; segments and scores become float64.

    Only "results" is required at the top (OpenTAD writes nothing else). Segments that are empty or reversed are kept:
    the evaluators count them as false positives. Raises ValueError naming file, key and value for anything else.
    """
    document = read_json(path)
    if not isinstance(document, dict) or not isinstance(document.get("results"), dict):
        raise ValueError(
            f'{path} needs an object "results" that maps video ids to lists of predictions, at the top; '
            f"its top level is {brief(list(document) if isinstance(document, dict) else document)}"
        )
    indices: dict[str, int] = {}
    predictions = {
        video_id: read_detections(f"{path}: results[{video_id!r}]", rows, indices)
        for video_id, rows in document["results"].items()
    }
    if (cut := document.get("num_cut")) is not None:
        if not isinstance(cut, dict) or not all(type(number) is int and number >= 0 for number in cut.values()):
            raise ValueError(f"{path}: num_cut is {brief(cut)}; give an object that maps video ids to numbers, or none")
        # The file names videos that were cut; where it has the key at all, the others were not.
        predictions = {video_id: replace(one, num_cut=cut.get(video_id, 0)) for video_id, one in predictions.items()}
    note, made_with = document.get("note"), document.get("made_with")
    return Results(
        predictions,
        tuple(indices),
        note if isinstance(note, str) else None,
        made_with if isinstance(made_with, dict) else None,
    )


def _rows(video_id: str, detections: Detections, classes: Sequence[str]) -> list[dict[str, Any]]:
    for name in ("segments", "scores"):
        if not torch.isfinite(getattr(detections, name)).all():
            raise ValueError(f"the {name} predicted for video {video_id!r} hold NaN or infinity; nothing was written")
    labels = detections.labels.tolist()
    if labels and not 0 <= min(labels) <= max(labels) < len(classes):
        raise ValueError(
            f"labels {min(labels)} to {max(labels)} predicted for video {video_id!r} do not index {len(classes)} "
            "classes; pass the classes of the localizer that predicted them"
        )
    return [
        {"segment": segment, "label": classes[label], "score": score}
        for segment, label, score in zip(detections.segments.tolist(), labels, detections.scores.tolist(), strict=True)
    ]


def read_detections(where: str, rows: Any, indices: dict[str, int]) -> Detections:
    """The predictions of a video; `indices` has the label of each class, and gets those of new ones. ValueError as
    `read_results`; `where` they stand."""
    if not isinstance(rows, list):
        raise ValueError(f"{where} is {brief(rows)}; it must be a list of predictions")
    segments, scores, labels = [], [], []
    for position, row in enumerate(rows):
        try:
            segment, label, score = row["segment"], row["label"], row["score"]
        except (TypeError, KeyError):
            raise ValueError(
                f'{where}[{position}] is {brief(row)}; it needs the keys "segment", "label" and "score"'
            ) from None
        if type(segment) is not list or len(segment) != 2 or not (_is_finite(segment[0]) and _is_finite(segment[1])):
            raise ValueError(f"{where}[{position}].segment is {brief(segment)}; give [start, end] in finite seconds")
        if not isinstance(label, str):
            raise ValueError(f"{where}[{position}].label is {brief(label)}; give the name of a class, in quotes")
        if not _is_finite(score):
            raise ValueError(f"{where}[{position}].score is {brief(score)}; give a finite number")
        segments.append(segment)
        scores.append(score)
        labels.append(indices.setdefault(label, len(indices)))
    return Detections(
        segments=torch.tensor(segments, dtype=torch.float64).reshape(-1, 2),
        scores=torch.tensor(scores, dtype=torch.float64),
        labels=torch.tensor(labels, dtype=torch.int64),
    )


_NUMBERS = frozenset((int, float))


def _is_finite(value: Any) -> bool:
    """A JSON number that a float can hold; `true` is an int to Python, and is refused."""
    # Bounds, not isfinite: an int of thousands of digits is a valid JSON number that no float holds. NaN compares as
    # False.
    return type(value) in _NUMBERS and -1e300 < value < 1e300
