"""Label Studio's JSON and JSON-MIN.

    [{"data": {"video": url}, "annotations": [{"result": [{"type", "value"}]}]}]          JSON
    [{"video": url, CONTROL: [{"start", "end", "labels": [...]}]}]                        JSON-MIN

`timelinelabels` count frames from 1, the last one included, at the `frameRate` of the labelling config's Video tag;
`labels` of the audio track are in seconds. Predictions and cancelled annotations are no annotations.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from re2tal.data.building.annotation_formats.found import Found, as_number, dictionary, items, video_id_of
from re2tal.data.building.annotation_formats.source import Source
from re2tal.strict_json import brief
from re2tal.video_ids import VIDEO_SUFFIXES


def is_label_studio(source: Source) -> bool:
    """A list of tasks, each of which names a video."""
    tasks = list(items(source.json))
    # The first few tell; an export may have a hundred thousand.
    return bool(tasks) and all(isinstance(one, dict) and _video(one) is not None for one in tasks[:20])


def read_label_studio(source: Source, found: Found) -> None:
    """Add the regions of all annotators."""
    for number, task in enumerate(items(source.json)):
        where = f"{source.path.name} task {dictionary(task).get('id', number)}"
        name = _video(dictionary(task))
        if name is None:
            found.leave_out(where, "it names no video")
            continue
        if len(others := {video_id_of(one) for one in _files(dictionary(task))}) > 1:
            found.leave_out(where, f"it shows several videos: {', '.join(sorted(others))[:80]}")
            continue
        found.video(name)
        if len([one for one in items(task.get("annotations")) if not dictionary(one).get("was_cancelled")]) > 1:
            found.note(f"{source.path.name}: tasks have several annotations, of several people; all are taken")
        if "data" in task and not found.listed(where, task, "annotations") and task.get("predictions"):
            found.leave_out(where, "it has predictions only")
        for position, region in enumerate(_regions(where, task, found)):
            _read_region(f"{where} region {position}", name, region, found)


def _read_region(where: str, name: str, value: Mapping[str, Any], found: Found) -> None:
    is_timeline = "timelinelabels" in value
    labels = value.get("timelinelabels" if is_timeline else "labels")
    spans = value.get("ranges") if is_timeline else [value]
    if not is_timeline and not {"start", "end", "labels"} <= set(value):
        found.leave_out(where, f"it marks no segment: {', '.join(sorted(value))[:80]}")
        return
    if not (isinstance(labels, list) and labels and isinstance(spans, list) and spans):
        found.leave_out(where, f"its labels are {brief(labels)}, its ranges {brief(spans)}: no lists with an entry")
        return
    for span in map(dictionary, spans):
        for label in labels:
            if is_timeline:
                first = as_number(span.get("start"))
                found.frames(where, name, None if first is None else first - 1, span.get("end"), label)
            else:
                found.action(where, name, span["start"], span["end"], label)


def _regions(where: str, task: dict[str, Any], found: Found) -> Iterator[Mapping[str, Any]]:
    if "data" not in task:
        for values in task.values():
            yield from (one for one in items(values) if isinstance(one, dict))
        return
    for annotation in items(task.get("annotations")):
        if not isinstance(annotation, dict):
            found.leave_out(where, f"its annotation {brief(annotation)} is no object")
        elif not annotation.get("was_cancelled"):
            for region in found.listed(where, annotation, "result"):
                if dictionary(region).get("value"):
                    yield dictionary(region["value"])


def _video(task: Mapping[str, Any]) -> str | None:
    """The first text of a task's data that ends like a video file, or else the one called video."""
    files, other = _files(task), dictionary(task.get("data", task)).get("video")
    return files[0] if files else other if isinstance(other, str) else None


def _files(task: Mapping[str, Any]) -> list[str]:
    texts = (value for value in dictionary(task.get("data", task)).values() if isinstance(value, str))
    return [value for value in texts if value.lower().split("&")[0].endswith(VIDEO_SUFFIXES)]
