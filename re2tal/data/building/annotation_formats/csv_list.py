"""A table of segments: video, start, end, label; with or without a header, apart by commas, semicolons or tabs.

Times are seconds, mm:ss or hh:mm:ss.mmm, or in the unit that the header says (start_ms, "start (min)"). They are
frames, counted from 0, where the header says so (start_frame), or where --fps is given and the header says no unit;
the end frame is the first one after the segment. Further columns with a known name are read too: subset or split, the
video's length, and its rate. A header that is not understood is refused: positions tell only where there is none.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from re2tal.data.building.annotation_formats.found import Found, as_decimal, as_seconds, video_id_of
from re2tal.data.building.annotation_formats.source import Source
from re2tal.video_ids import VIDEO_SUFFIXES

_NAMES: dict[str, tuple[str, ...]] = {
    "video": (
        *("video", "videoid", "videoname", "vid", "youtubeid", "file", "filename", "filepath", "path", "media"),
        *("clip", "clipid", "name", "id", "uid", "mediafile", "videofile"),
    ),
    "start": (
        *("start", "starttime", "timestart", "tstart", "tinit", "begin", "begintime", "starttimestamp", "onset"),
        "from",
    ),
    "end": (
        *("end", "endtime", "timeend", "tend", "stop", "stoptime", "stoptimestamp", "endtimestamp", "finish"),
        *("offset", "to"),
    ),
    "label": (
        *("classname", "label", "labelname", "class", "action", "actionlabel", "category", "behavior", "behaviour"),
        *("activity", "event", "tag", "type", "annotation"),
    ),
    "length": ("duration", "length"),
    "subset": ("subset", "split", "partition"),
    "video_length": ("videoduration", "videolength", "mediaduration"),
    "rate": ("fps", "videofps", "framerate", "framespersecond"),
}
_FRAME = "frame"
_TIMES = ("start", "end", "length", "video_length")
_SECONDS = {"": 1.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9, "min": 60.0, "h": 3600.0}
"""Unit -> seconds; the first is none."""
_UNITS = {
    **dict.fromkeys(("s", "sec", "secs", "second", "seconds"), "s"),
    **dict.fromkeys(("ms", "msec", "msecs", "millis", "millisecond", "milliseconds"), "ms"),
    **dict.fromkeys(("us", "\N{GREEK SMALL LETTER MU}s", "usec", "micros", "microsecond", "microseconds"), "us"),
    **dict.fromkeys(("ns", "nsec", "nanos", "nanosecond", "nanoseconds"), "ns"),
    **dict.fromkeys(("min", "mins", "minute", "minutes"), "min"),
    **dict.fromkeys(("h", "hr", "hrs", "hour", "hours"), "h"),
    **dict.fromkeys(("frame", "frames"), _FRAME),
}
_LONG = 1000
"""Whole numbers above it may be frames."""
_OF_FRAMES = ("number", "num", "no", "nr", "index", "idx", "id")
_FUSED = re.compile(f"(.+?)({'|'.join(sorted((one for one in _UNITS if len(one) > 1), key=len, reverse=True))})")


def is_csv(source: Source) -> bool:
    """A table with a header that names its columns, or two times in its first row."""
    return bool(_columns(source))


def read_csv(source: Source, found: Found) -> None:
    """Add the rows."""
    columns = _columns(source)
    assert columns is not None
    header, width, rows = columns
    units = {what: unit for what, (_, unit) in header.items()}
    times = "start", "end" if "end" in header else "length"
    first, second = (units[what] for what in times)
    # One time with a unit and one without: to guess would be wrong by a factor of the frame rate.
    if first != second and "" in (first, second) and ("s" not in (first, second) or found.wanted.fps is not None):
        raise ValueError(f"{source.path}: its {times[0]} or its {times[1]} has a unit, the other none; write both")
    written = {
        what: [row[at] for _, row in rows if at < len(row)] for what, (at, _) in header.items() if what in _TIMES
    }
    numbers = {what: [text for text in texts if as_decimal(text) is not None] for what, texts in written.items()}
    _check_commas(source, [text for texts in numbers.values() for text in texts])
    if first == "" and found.wanted.fps is None:
        # Who writes rates may have counted frames.
        least = 0 if "rate" in header else _LONG
        _note_whole(source, [text for what in times for text in numbers[what]], found, least=least)
    for number, row in rows:
        where = f"{source.path.name} row {number}"
        cells = {what: row[index] if index < len(row) else "" for what, (index, _) in header.items()}
        if row[0].startswith("#"):
            if all(_is_time(cells[what]) for what in times):
                found.leave_out(where, f"it begins with #: a comment, or the id {row[0][:80]!r}; rename the video")
            continue
        if any(row[width:]):
            found.leave_out(where, f"it has {len(row)} cells, more than the {width} of the first row: quote commas")
            continue
        if as_decimal(cells["label"]) == -1:  # HACS Clips: what is not in the clip
            found.leave_out(where, "its label is -1: a negative example")
            continue
        if not video_id_of(cells["video"]):
            found.leave_out(where, f"its video {cells['video'][:80]!r} is no name of a file")
            continue
        frames = [what for what in times if units[what] == _FRAME or (not units[what] and found.wanted.fps is not None)]
        if any(":" in cells[what] for what in frames if units[what] == _FRAME):
            found.leave_out(where, "it has a clock's time in a column of frames")
            continue
        said = as_decimal(cells.get("rate", ""))
        rate: float | None = 1.0
        if any(as_decimal(cells[one]) is not None for one in frames):
            rate = _rate(where, cells["video"], said, found)
        if rate is None:
            continue
        start, end = (
            _time(cells[what], 1 / rate if what in frames else _SECONDS.get(units[what], 1.0)) for what in times
        )
        if "end" not in cells and not isinstance(start, str) and not isinstance(end, str):
            end += start
        subset = cells.get("subset", "").lower() or None
        length, unit = cells.get("video_length", ""), units.get("video_length", "")
        found.video(
            cells["video"],
            subset=subset,
            duration=None if unit == _FRAME else _time(length, _SECONDS[unit]),
            frame=as_decimal(length) if unit == _FRAME else None,
            fps=said if said and said > 0 else None,
        )
        found.action(where, cells["video"], start, end, cells["label"], subset=subset)


def _rate(where: str, video: str, said: float | None, found: Found) -> float | None:
    """Frames per second of a row: its own, or as `Found.rate` knows it. ValueError where two are said."""
    if said is None or said <= 0:
        return found.rate(where, video)
    if found.wanted.fps not in (None, said):
        raise ValueError(f"{where}: its rate is {said:g}, and --fps says {found.wanted.fps:g}; leave out --fps")
    return said


def _check_commas(source: Source, numbers: Sequence[str]) -> None:
    """ValueError where nothing tells what a comma or a point in times means."""
    commas = [text for text in numbers if "," in text]
    points = [text for text in numbers if "." in text]
    if commas and (points or (source.delimiter != ";" and all(re.fullmatch(r"\d+,\d{3}", one) for one in commas))):
        some = " and ".join(map(repr, [*commas[:1], *points[:1]]))
        raise ValueError(f"{source.path}: are times such as {some} decimals or thousands? Write decimals with a point")


def _note_whole(source: Source, numbers: Sequence[str], found: Found, *, least: float) -> None:
    """A note where times may be in another unit: all are whole, and one is `least` or more."""
    values = [value for text in numbers if (value := as_decimal(text)) is not None]
    longest = max(values, default=0.0)
    if values and longest >= least and not any(value % 1 for value in values):
        found.note(
            f"{source.path.name}: its times are whole numbers, to {longest:g}, and taken for seconds; if they are "
            "frames, call the columns start_frame and end_frame, or give --fps; if milliseconds, start_ms and end_ms"
        )


def _time(text: str, unit: float) -> float | str:
    """Seconds of a number in a unit, or of a clock's time; the text where it is neither."""
    number = as_decimal(text)
    value = as_seconds(text) if number is None else number * unit
    return text if value is None else value


def _is_time(text: str) -> bool:
    return not isinstance(_time(text, 1.0), str)


Columns = dict[str, tuple[int, str]]
"""What -> (index of its column, its unit; "": none is said)."""


def _columns(source: Source) -> tuple[Columns, int, list[tuple[int, list[str]]]] | None:
    """The columns, their number, and the rows below the header with theirs; None for something else.

    ValueError for a header that is not understood.
    """
    rows = [(n, row) for n, row in enumerate(source.rows, 1) if any(row)]
    while rows and rows[0][1][0].startswith("#"):
        first = rows[0][1]
        if _is_whole(header := _named([first[0].lstrip("# "), *first[1:]])):
            return header, len(first), rows[1:]
        rows = rows[1:]
    if not rows:
        return None
    first = rows[0][1]
    header = _named(first)
    if _is_whole(header):
        return header, len(first), rows[1:]
    if positions := _unnamed(first):
        start, _ = positions["start"]
        if len(first) > start + 3 and all(_is_time(cell) for cell in first[start : start + 4]):
            raise ValueError(
                f"{source.path}: nothing tells which of the numbers {first[start:][:10]} are times: add a header"
            )
        return positions, len(first), rows
    if any(_is_time(cell) for cell in first):
        return None
    if len(header) > 1 or (len(rows) > 1 and _unnamed(rows[1][1])):
        missing = [what for what in ("video", "start", "end", "label") if what not in header]
        known = "; ".join(f"{what}: {', '.join(_NAMES[what])}" for what in ("video", "start", "end", "length", "label"))
        raise ValueError(
            f"{source.path}: its header {first[:20]} has no column for {', '.join(missing)}; rename its columns, or "
            f"remove it where the order is video, start, end, label. Names understood, with units such as start_ms "
            f"or start_frame: {known}"
        )
    return None


def _is_whole(columns: Columns) -> bool:
    return {"video", "start", "label"} <= set(columns) and ("end" in columns or "length" in columns)


def _named(row: Sequence[str]) -> Columns:
    """The columns whose names are understood."""
    columns: Columns = {}
    by_cell = [_name(cell) for cell in row]
    for what, names in _NAMES.items():
        places = [
            (unit == _FRAME, not unit, names.index(name), index, unit)
            for index, (name, unit) in enumerate(by_cell)
            if name in names and (not unit or what in _TIMES)
        ]
        if len({place[:3] for place in places}) < len(places):
            raise ValueError(f"its header {list(row)[:20]} has two columns for {what} of one name; remove one")
        if places:  # a unit rather than none, but not frames, then the commonest name
            *_, index, unit = min(places)
            beside_frames = max(places)[0] and not unit
            columns[what] = index, "s" if beside_frames else unit
    starts, ends = (by_cell[columns[what][0]][0] if what in columns else "" for what in ("start", "end"))
    if ends == "offset" and starts != "onset":  # it may be where something lies
        del columns["end"]
    return columns


def _name(cell: str) -> tuple[str, str]:
    """(name in small letters without signs, unit) of a column."""
    text = re.sub(r"([a-z])([A-Z])", r"\1 \2", unicodedata.normalize("NFKC", cell)).lower()
    words = re.findall(r"[^\W_]+", text)
    name = "".join(words)
    if name in _NAMES["rate"]:  # frame_rate is no time in frames
        return name, ""
    units = [word for word in words if word in _UNITS]
    if len(words) > 1 and len(units) == 1:
        rest = [word for word in words if word != units[0]]
        if _UNITS[units[0]] == _FRAME:
            rest = [word for word in rest if word not in _OF_FRAMES]
        return "".join(rest), _UNITS[units[0]]
    times = [one for what in _TIMES for one in _NAMES[what]]
    if name not in times and (fused := _FUSED.fullmatch(name)) and fused[1] in times:
        return fused[1], _UNITS[fused[2]]
    return name, ""


def _unnamed(row: Sequence[str]) -> Columns | None:
    """Columns of a table without a header: the first two times that stand side by side, and names around them."""
    is_time = [_is_time(cell) for cell in row]
    start = next((i for i in range(1, len(row) - 1) if is_time[i] and is_time[i + 1]), None)
    if start is None or len(row) < 4:
        return None
    video = next((i for i, cell in enumerate(row) if cell.lower().endswith(VIDEO_SUFFIXES)), 0)
    others = [i for i in range(len(row)) if i not in (video, start, start + 1) and row[i]]
    if not others:
        return None
    names = [i for i in others if not is_time[i]]
    if len(names) > 1:
        raise ValueError(f"nothing tells which of {[row[i] for i in names]} is the label: add a header")
    label = min(others, key=lambda i: is_time[i])  # a name rather than a duration; a number may be a class
    return {"video": (video, ""), "start": (start, ""), "end": (start + 1, ""), "label": (label, "")}
