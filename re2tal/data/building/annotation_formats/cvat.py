"""CVAT's "for video 1.1": tracks of shapes by frame.

A segment is a run of frames in which the shape is not `outside`; the first frame outside is its end. A track that is
never outside again lasts to the end of the task. Frames are the video's: CVAT has applied start_frame and step.
The label is the track's, or the attribute that --label names, whose changes end a run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from xml.etree.ElementTree import Element

from re2tal.data.building.annotation_formats.found import Found, as_number, video_id_of
from re2tal.data.building.annotation_formats.source import Source


def is_cvat(source: Source) -> bool:
    """Tracks, or pictures, in `annotations`."""
    return source.xml is not None and source.xml.tag == "annotations"


def read_cvat(source: Source, found: Found) -> None:
    """Add the runs of all tracks."""
    root = source.xml
    assert root is not None
    if root.find("image") is not None and root.find("track") is None:
        raise ValueError(f"{source.path} has pictures, not tracks; export the task as 'CVAT for video 1.1'")
    names = dict.fromkeys(text.strip() for one in root.iter("source") if (text := one.text))
    if len(names) > 1:
        raise ValueError(f"{source.path} has tracks of {len(names)} videos; export each task on its own")
    name = next(iter(names), "")
    if not name:
        name = source.path.stem
        found.note(f"{source.path.name} names no video; its own name is taken")
    found.video(name)
    start = _whole(root, "start_frame") or 0.0
    step = as_number((re.search(r"step=(\d+)", root.findtext(".//frame_filter") or "") or [0, "1"])[1]) or 1.0
    size = _whole(root, "size")
    is_job = root.find("./meta/job") is not None  # start_frame of a job counts in its task, not in the video
    last = start + size * step if size and not is_job else None
    if last is None and not is_job and found.measure is not None and (measured := found.measure(video_id_of(name))):
        last = round(measured[0] * (found.wanted.fps or measured[1] or 0.0))  # without a rate it is left out below
    attributes = {one.get("name") for one in root.iter("attribute")}
    if found.wanted.label is not None and found.wanted.label not in attributes:
        raise ValueError(
            f"{source.path} has no attribute {found.wanted.label!r}; it has {sorted(map(str, attributes))}"
        )
    for track in root.iter("track"):
        where = f"{source.path.name} track {track.get('id')}"
        for first, end, label in _runs(track, found.wanted.label):
            stop = last if end is None else end
            if first < start:
                reason = f"it is before start_frame {start:g} of its task; frames of CVAT's own export are the video's"
                found.leave_out(f"{where} frame {first:g}", reason)
            elif stop is None:
                what = "job" if is_job else "video"
                remedy = "export the whole task" if is_job else "give --videos FOLDER"
                reason = f"it lasts to the end of the {what}, which the file does not tell; {remedy}"
                found.leave_out(f"{where} frame {first:g}", reason)
            else:
                found.frames(f"{where} frame {first:g}", name, first, stop, label)


def _runs(track: Element, attribute: str | None) -> Iterator[tuple[float, float | None, str | None]]:
    """(first frame, first frame after, label); None for one that lasts to the end."""
    shapes = [(frame, shape) for shape in track if (frame := as_number(shape.get("frame"))) is not None]
    first: float | None = None
    label: str | None = None
    # Shapes need not be in order, and a run is told by its neighbours.
    for frame, shape in sorted(shapes, key=lambda one: one[0]):
        shown = _label(track, shape, attribute) if shape.get("outside", "0").lower() in ("0", "false") else None
        if first is not None and shown != label:
            yield first, frame, label
            first = None
        if first is None and shown is not None:
            first, label = frame, shown
    if first is not None:
        yield first, None, label


def _label(track: Element, shape: Element, attribute: str | None) -> str | None:
    if attribute is None:
        return track.get("label") or ""
    return next((one.text or "" for one in shape.iter("attribute") if one.get("name") == attribute), None)


def _whole(root: Element, name: str) -> float | None:
    return as_number(root.findtext(f"./meta/task/{name}") or root.findtext(f"./meta/job/{name}"))
