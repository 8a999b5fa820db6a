"""A table of segments: video, start, end, label; with or without a header, apart by commas, semicolons or tabs.

Times are seconds, mm:ss or hh:mm:ss.mmm. They are frames, counted from 0, where the header says so (start_frame), or
where --fps is given; the end frame is the first one after the segment. Further columns with a known name are read too:
subset or split, and the video's length.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from re2tal.data.building.annotation_formats.found import Found, Source, as_number, as_seconds, video_id_of

_NAMES: dict[str, tuple[str, ...]] = {
    "video": (
        *("video", "videoid", "videoname", "vid", "youtubeid", "file", "filename", "filepath", "path", "media"),
        *("clip", "clipid", "name", "id", "uid", "mediafile", "videofile"),
    ),
    "start": (
        "start",
        "starttime",
        "timestart",
        "tstart",
        "tinit",
        "begin",
        "begintime",
        "starttimestamp",
        "onset",
        "from",
    ),
    "end": ("end", "endtime", "timeend", "tend", "stop", "stoptime", "stoptimestamp", "finish", "offset", "to"),
    "label": (
        *("classname", "label", "labelname", "class", "action", "actionlabel", "category", "behavior", "behaviour"),
        *("activity", "event", "tag", "type", "annotation"),
    ),
    "length": ("duration", "length"),
    "subset": ("subset", "split", "partition"),
    "video_length": ("videoduration", "videolength", "mediaduration"),
}
_UNITS = {
    **dict.fromkeys(("s", "sec", "secs", "second", "seconds"), 1.0),
    **dict.fromkeys(("ms", "msec", "millisecond", "milliseconds"), 1e-3),
}
_FRAMES = ("frame", "frames")


def is_csv(source: Source) -> bool:
    """A table with a header that names its columns, or two times in its first row."""
    return bool(_columns(source))


def read_csv(source: Source, found: Found) -> None:
    """Add the rows."""
    columns = _columns(source)
    assert columns is not None
    header, rows = columns
    for number, row in rows:
        where = f"{source.path.name} row {number}"
        cells = {what: row[index] if index < len(row) else "" for what, (index, _) in header.items()}
        units = {what: unit for what, (_, unit) in header.items()}
        if as_number(cells["label"]) == -1:  # HACS Clips: what is not in the clip
            found.leave_out(where, "its label is -1: a negative example")
            continue
        if not video_id_of(cells["video"]):
            found.leave_out(where, f"its video {cells['video'][:80]!r} is no name of a file")
            continue
        rate = found.rate(where, cells["video"]) if _counts_frames(cells, units, found) else 1.0
        if rate is None:
            continue
        start, end = _times(cells, units, found, rate)
        subset = cells.get("subset", "").lower() or None
        found.video(cells["video"], subset=subset, duration=cells.get("video_length"))
        found.action(where, cells["video"], start, end, cells["label"], subset=subset)


def _times(
    cells: Mapping[str, str], units: Mapping[str, float | None], found: Found, rate: float
) -> tuple[float | str, float | str]:
    """(start, end) in seconds, or as they are written where they are no times."""
    times: list[float | str] = []
    for what in ("start", "end" if "end" in cells else "length"):
        text, unit = cells[what], units[what]
        number = as_number(text)
        if number is None:
            value = as_seconds(text)
        elif unit is None or (found.wanted.fps is not None and unit == 1.0):
            value = number / rate
        else:
            value = number * unit
        times.append(text if value is None else value)
    start, end = times
    if "end" not in cells and not isinstance(start, str) and not isinstance(end, str):
        end += start
    return start, end


def _counts_frames(cells: Mapping[str, str], units: Mapping[str, float | None], found: Found) -> bool:
    """Whether a time of this row needs a frame rate."""
    return any(
        as_number(cells[what]) is not None and (units[what] is None or found.wanted.fps is not None)
        for what in ("start", "end", "length")
        if what in cells
    )


Columns = dict[str, tuple[int, float | None]]
"""What -> (index of its column, seconds of its unit; None: frames)."""


def _columns(source: Source) -> tuple[Columns, list[tuple[int, list[str]]]] | None:
    """The columns and the rows below the header, with their numbers; None for something else."""
    rows = [(n, row) for n, row in enumerate(source.rows, 1) if any(row) and not row[0].startswith("#")]
    if not rows:
        return None
    if header := _named(rows[0][1]):
        return header, rows[1:]
    if header := _unnamed(rows[0][1]):
        return header, rows
    # A header in another language, or with names that nobody knows: the order of the first row of times tells.
    if (
        len(rows) > 1
        and not any(as_seconds(cell) is not None for cell in rows[0][1])
        and (header := _unnamed(rows[1][1]))
    ):
        return header, rows[1:]
    return None


def _named(row: Sequence[str]) -> Columns | None:
    columns: Columns = {}
    for what, names in _NAMES.items():
        cells = [(name, index, unit) for index, (name, unit) in enumerate(map(_name, row)) if name in names]
        places = [(unit is None, names.index(name), index, unit) for name, index, unit in cells]
        if places:  # seconds rather than frames, then the commonest name
            _, _, index, unit = min(places, key=lambda place: place[:3])
            columns[what] = index, unit
    is_whole = {"video", "start", "label"} <= set(columns) and ("end" in columns or "length" in columns)
    return columns if is_whole else None


def _name(cell: str) -> tuple[str, float | None]:
    """(name in small letters without signs, seconds of its unit; None: frames) of a column."""
    words = re.findall(r"[a-z0-9]+", re.sub(r"([a-z])([A-Z])", r"\1 \2", cell).lower())
    unit: float | None = 1.0
    if len(words) > 1 and words[-1] in _UNITS:
        unit = _UNITS[words.pop()]
    elif found := [word for word in words if word in _FRAMES]:
        words, unit = [word for word in words if word not in found], None
    return "".join(words), unit


def _unnamed(row: Sequence[str]) -> Columns | None:
    """Columns of a table without a header: the first two times that stand side by side, and names around them."""
    is_time = [as_seconds(cell) is not None for cell in row]
    start = next((i for i in range(1, len(row) - 1) if is_time[i] and is_time[i + 1]), None)
    if start is None or len(row) < 4:
        return None
    others = [i for i in range(len(row)) if i not in (0, start, start + 1) and row[i]]
    if not others:
        return None
    label = min(others, key=lambda i: is_time[i])  # a name rather than a duration; a number may be a class
    return {"video": (0, 1.0), "start": (start, 1.0), "end": (start + 1, 1.0), "label": (label, 1.0)}
