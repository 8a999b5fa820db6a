"""Detections as files of annotation tools, to be corrected there, and as a table.

`re2tal annotations convert` reads each of them back.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable
from io import StringIO
from pathlib import Path
from xml.etree.ElementTree import Element, SubElement, indent, tostring

from re2tal.reporting.found import FoundAction, FoundInVideo, as_text, milliseconds_of

MIME_TYPES = {".mp4": "video/mp4", ".m4v": "video/mp4", ".mov": "video/quicktime", ".mpg": "video/mpeg"}


def csv_table(videos: Iterable[FoundInVideo]) -> str:
    """A row per action, the surest of each video first; seconds from the start of the video."""
    header = ("video", "start", "end", "label", "score")
    rows = (
        (video.name, one.start_seconds, one.end_seconds, one.label, one.score)
        for video in videos
        for one in video.actions
    )
    return _table([header, *rows], delimiter=",")


def boris_events(videos: Iterable[FoundInVideo]) -> str:
    """BORIS' aggregated events, apart by tabs: a row per action, in order of time; its comment is the score."""
    header = (
        *("Observation id", "Media file name", "Media duration (s)", "Subject", "Behavior", "Behavioral category"),
        *("Behavior type", "Start (s)", "Stop (s)", "Duration (s)", "Comment start", "Comment stop"),
    )
    rows = []
    for video in videos:
        media = video.name if video.path is None else as_text(video.path.resolve())
        for one in sorted(video.actions, key=lambda one: (one.start_seconds, one.end_seconds)):
            first, last = milliseconds_of(one)
            length = round(video.duration_seconds, 3)
            row = (video.name, media, length, "No focal subject", one.label, "", "STATE", first / 1000, last / 1000)
            rows.append((*row, (last - first) / 1000, f"score {one.score:.4f}", ""))
    return _table([header, *rows], delimiter="\t")


def eaf(video: FoundInVideo) -> str:
    """ELAN's .eaf with a tier per class; what overlaps on it stands on further ones. ELAN has no place for scores."""
    # A date of no meaning: the same detections give the same file.
    root = Element(
        "ANNOTATION_DOCUMENT", AUTHOR="re2tal", DATE="1970-01-01T00:00:00+00:00", FORMAT="3.0", VERSION="3.0"
    )
    header = SubElement(root, "HEADER", MEDIA_FILE="", TIME_UNITS="milliseconds")
    SubElement(header, "MEDIA_DESCRIPTOR", _medium(video))
    order = SubElement(root, "TIME_ORDER")
    number = 0
    for name, actions in _tiers(video.actions):
        tier = SubElement(root, "TIER", LINGUISTIC_TYPE_REF="actions", TIER_ID=name)
        for first, last, label in actions:
            number += 1
            slots = f"ts{2 * number - 1}", f"ts{2 * number}"
            for slot, milliseconds in zip(slots, (first, last), strict=True):
                SubElement(order, "TIME_SLOT", TIME_SLOT_ID=slot, TIME_VALUE=str(milliseconds))
            one = SubElement(
                SubElement(tier, "ANNOTATION"),
                "ALIGNABLE_ANNOTATION",
                ANNOTATION_ID=f"a{number}",
                TIME_SLOT_REF1=slots[0],
                TIME_SLOT_REF2=slots[1],
            )
            SubElement(one, "ANNOTATION_VALUE").text = label
    SubElement(root, "LINGUISTIC_TYPE", GRAPHIC_REFERENCES="false", LINGUISTIC_TYPE_ID="actions", TIME_ALIGNABLE="true")
    indent(root, space="    ")
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + tostring(root, encoding="unicode") + "\n"


def _medium(video: FoundInVideo) -> dict[str, str]:
    """As ELAN writes it: the path is not percent-encoded."""
    path = Path(video.name if video.path is None else as_text(video.path.resolve()))
    url = f"file://{path.as_posix()}" if path.is_absolute() else path.as_posix()
    mime = MIME_TYPES.get(path.suffix.lower(), "video/*")
    return {"MEDIA_URL": url, "MIME_TYPE": mime, "RELATIVE_MEDIA_URL": f"./{path.name}"}


def _tiers(actions: Iterable[FoundAction]) -> list[tuple[str, list[tuple[int, int, str]]]]:
    """(name, annotations in milliseconds) of tiers on which nothing overlaps, the surest first where it does."""
    tiers: dict[tuple[str, int], list[tuple[int, int, str]]] = {}
    for action in actions:
        first, last = milliseconds_of(action)
        # Control characters are not allowed in XML.
        label, layer = "".join(one if one.isprintable() else " " for one in action.label), 0
        while any(first < other[1] and other[0] < last for other in tiers.get((label, layer), [])):
            layer += 1
        tiers.setdefault((label, layer), []).append((first, last, label))
    taken = {label for label, _ in tiers}
    names = {}
    for label, layer in sorted(tiers):
        name = f"{label} ({layer + 1})" if layer else label
        while layer and name in taken:  # a class of this name, as ELAN refuses two tiers of one
            name += "'"
        taken.add(name)
        names[label, layer] = name
    # ELAN wants a tier.
    return [(names[key], sorted(tiers[key])) for key in sorted(tiers)] or [("actions", [])]


def _table(rows: Iterable[Iterable[object]], *, delimiter: str) -> str:
    text = StringIO()
    csv.writer(text, delimiter=delimiter, lineterminator="\n").writerows(rows)
    return text.getvalue()
