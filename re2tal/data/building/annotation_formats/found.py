"""What readers share: the file that is read, what was asked, and what was found.

A row that cannot be read is left out and named; it never ends the job.
"""

from __future__ import annotations

import codecs
import csv
import io
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.etree import ElementTree

from re2tal.data.building.labels import is_label
from re2tal.strict_json import brief, read_json
from re2tal.structures import SUBSETS, find_subset
from re2tal.video_ids import VIDEO_SUFFIXES, plain_id

MAX_BYTES = 1 << 28
"""An export of this size holds millions of rows."""

_CLOCK = re.compile(r"(?:(\d+):)?(\d+):(\d{1,2}(?:[.,]\d+)?)")
_NUMBER = re.compile(r"[+-]?\d+(?:[.,]\d+)?(?:[eE][+-]?\d+)?")
_SUBSET_WORD = re.compile(rf"(?<![a-z])({'|'.join(sorted(SUBSETS, key=len, reverse=True))})(?![a-z])")


class Source:
    """An annotation file, parsed as it is asked for. ValueError says why it cannot be."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not a file; check the path")
        if (size := path.stat().st_size) > MAX_BYTES:
            raise ValueError(f"{path} has {size} bytes, more than the limit of {MAX_BYTES}; split it")
        self.path = path
        with path.open("rb") as file:
            head = file.read(4096).lstrip(codecs.BOM_UTF8).replace(b"\0", b"").lstrip(b"\xff\xfe \t\r\n")
        self.kind = {b"<": "xml", b"{": "json", b"[": "json"}.get(head[:1], "text")

    @cached_property
    def text(self) -> str:
        """The file as text; UTF-16 where a byte order mark says so."""
        content = self.path.read_bytes()
        marks = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        try:
            return content.decode("utf-16" if content.startswith(marks) else "utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.path} is not text in UTF-8 ({error}); save it as UTF-8") from None

    @cached_property
    def json(self) -> Any:
        """The file as JSON; None for another kind."""
        return read_json(self.path, max_bytes=MAX_BYTES) if self.kind == "json" else None

    @cached_property
    def xml(self) -> ElementTree.Element | None:
        """The root of an XML file; None for another kind. A document type is refused: entities come with it."""
        if self.kind != "xml":
            return None
        content = self.path.read_bytes()
        parser = ElementTree.XMLParser(target=_WithoutDoctype())
        try:
            if b"<!DOCTYPE" in content.replace(b"\0", b""):  # expat would expand entities up to the end of a chunk
                _WithoutDoctype().doctype("", None, None)
            parser.feed(content)
            root = parser.close()
        except (ElementTree.ParseError, LookupError) as error:
            raise ValueError(f"{self.path} is not usable XML: {error}") from None
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from None
        assert isinstance(root, ElementTree.Element)
        return root

    @cached_property
    def rows(self) -> list[list[str]]:
        """The cells of a table; empty for another kind. The first rows tell what stands between the cells."""
        if self.kind != "text":
            return []
        lines, text = self.text.splitlines(), io.StringIO(self.text, newline="")
        delimiter = max("\t;,", key=lambda one: sum(line.count(one) >= 2 for line in lines[:100]))
        try:
            rows = [[cell.strip() for cell in row] for row in csv.reader(text, delimiter=delimiter)]
        except csv.Error as error:
            raise ValueError(f"{self.path} is not usable as a table: {error}") from None
        for number, row in enumerate(rows, start=1):
            lines = [line for cell in row if "\n" in cell for line in cell.splitlines()[1:]]
            if any(line.count(delimiter) >= max(3, len(rows[0])) - 1 for line in lines):
                raise ValueError(f"{self.path} row {number} holds whole rows: a quote opens and does not close")
        return rows

    def table(self, *wanted: str) -> tuple[int, list[str]] | None:
        """(index of its row, cells in small letters) of the first header with all these columns; None without one."""
        for number, row in enumerate(self.rows[:100]):
            header = [cell.lower() for cell in row]
            if set(wanted) <= set(header):
                return number, header
        return None

    def records(self, number: int, header: Sequence[str], found: Found) -> Iterator[tuple[str, dict[str, str]]]:
        """(where, cells by column) of every row that is not empty, below the header in row `number`.

        A row that has more cells than the header is left out.
        """
        for line, row in enumerate(self.rows[number + 1 :], start=number + 2):
            where = f"{self.path.name} row {line}"
            if any(row[len(header) :]):
                found.leave_out(where, f"it has {len(row)} cells, more than the header's {len(header)}: quote commas")
            elif any(row):
                padded = [*row, *[""] * (len(header) - len(row))]
                yield where, dict(zip(header, padded, strict=False))


class _WithoutDoctype(ElementTree.TreeBuilder):
    def doctype(self, name: str, public_id: str | None, system_id: str | None) -> None:
        raise ValueError("it has a document type (<!DOCTYPE>), which could name entities and other files; remove it")


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the user asked of a conversion."""

    label: str | None = None
    """Which of several fields is the label, such as verb, or a tier's or attribute's name."""
    tiers: frozenset[str] = frozenset()
    """Tiers of ELAN to take; all if empty."""
    fps: float | None = None
    """Frames per second, where the file counts frames."""
    subset: str | None = None
    """Of all videos whose file says none."""
    classes: tuple[str, ...] = ()
    """Names of classes that are numbers in the file."""
    numbers: tuple[int, ...] = ()
    """The number of each of them, where their list says it."""


@dataclass(slots=True)
class FoundVideo:
    """One video of the result."""

    subset: str | None = None
    duration_seconds: float | None = None
    facts: dict[str, float] = field(default_factory=dict)
    """Frames and rate, as published files hold them: `frame`, `fps`."""
    actions: list[tuple[float, float, str]] = field(default_factory=list)
    is_known: bool = False
    """Whether its actions are; otherwise there are none because nobody says."""


@dataclass(slots=True)
class Found:
    """What the readers found so far."""

    wanted: Wanted
    measure: Callable[[str], tuple[float, float] | None] | None = None
    """Id -> (duration in seconds, frames per second) of the video's file, None where there is none."""
    videos: dict[str, FoundVideo] = field(default_factory=dict)
    durations: dict[str, float] = field(default_factory=dict)
    """Seconds of videos from a table of its own, whether or not they are among the videos."""
    left_out: list[str] = field(default_factory=list)
    """Where, and why: a sentence for each row that is not in the result."""
    notes: dict[str, None] = field(default_factory=dict)
    """What else a person should know; each once."""
    clashes: dict[str, None] = field(default_factory=dict)
    """Two names that give one id, and videos in two subsets: nothing may be written while there are any."""
    _names: dict[str, str] = field(default_factory=dict)
    """Id -> the longest name it came from."""

    def video(
        self,
        name: str,
        *,
        subset: str | None = None,
        duration: Any = None,
        is_known: bool = True,
        frame: float | None = None,
        fps: float | None = None,
    ) -> FoundVideo:
        """The entry of a video file or id; what is known of it is added."""
        video_id = video_id_of(name)
        if not video_id:
            self.leave_out(brief(name), "it names no video")
            return FoundVideo()
        one = self.videos.setdefault(video_id, FoundVideo())
        self._check_name(video_id, name)
        if one.subset and subset and find_subset(subset, [one.subset]) is None:
            self.clashes[f"video {video_id!r} is in {one.subset!r} and in {subset!r}: keep one"] = None
        one.subset = one.subset or subset
        seconds = as_seconds(duration)
        if one.duration_seconds is None and seconds is not None and seconds > 0:
            one.duration_seconds = seconds
        one.facts |= {k: int(v) if v == int(v) else v for k, v in (("frame", frame), ("fps", fps)) if v}
        one.is_known |= is_known
        return one

    def action(self, where: str, name: str, start: Any, end: Any, label: Any, *, subset: str | None = None) -> None:
        """Add one segment, in seconds or as a clock shows them; or leave it out and say why."""
        start_seconds, end_seconds = as_seconds(start), as_seconds(end)
        text = " ".join(label.split()) if isinstance(label, str) else label
        if not isinstance(name, str) or not video_id_of(name):
            self.leave_out(where, "it names no video" if not name else f"its video {brief(name)} is no name of a file")
        elif start_seconds is None or end_seconds is None:
            self.leave_out(where, f"its times are {brief(start)} and {brief(end)}: no seconds, mm:ss or hh:mm:ss")
        elif not is_label(text):
            self.leave_out(where, f"its label is {brief(label)}: no name of 1 to 200 printable characters")
        elif end_seconds <= start_seconds:
            what = "is reversed" if end_seconds < start_seconds else "lasts no time"
            self.leave_out(where, f"its segment {start_seconds:g} to {end_seconds:g} s {what}")
        elif start_seconds < 0:
            self.leave_out(where, f"its segment {start_seconds:g} to {end_seconds:g} s starts before the video")
        else:
            segment = round(start_seconds, 6), round(end_seconds, 6), text
            self.video(name, subset=subset).actions.append(segment)

    def frames(self, where: str, name: str, start: Any, end: Any, label: Any, *, subset: str | None = None) -> None:
        """Add one segment from frame `start` up to, but without, frame `end`; counted from 0."""
        first, last = as_number(start), as_number(end)
        if first is None or last is None:
            self.leave_out(where, f"its frames are {brief(start)} and {brief(end)}: no numbers")
            return
        if (rate := self.rate(where, name)) is not None:
            self.action(where, name, first / rate, last / rate, label, subset=subset)

    def _check_name(self, video_id: str, name: str) -> None:
        """Remember where an id comes from; a longer path to the same file says more, another one is a clash."""
        known = self._names.setdefault(video_id, name)
        (_, *said, folders), (_, *new, more) = _parts(known), _parts(name)
        count = min(len(folders), len(more))
        if folders[:count] != more[:count] or any(a and b and a != b for a, b in zip(said, new, strict=True)):
            self.clashes[f"{known!r} and {name!r} both give the id {video_id!r}: rename one"] = None
        elif (len(more), new) > (len(folders), said):
            self._names[video_id] = name

    def rate(self, where: str, name: str) -> float | None:
        """Frames per second of a video; None, and left out, where its file is missing. ValueError without options."""
        if self.wanted.fps is not None:
            return self.wanted.fps
        if self.measure is None:
            raise ValueError(
                f"{where}: its times are frames, and nothing tells how many make a second; give --fps, or --videos "
                "FOLDER"
            )
        if measured := self.measure(video_id_of(name)):
            return measured[1]
        self.leave_out(where, "its times are frames, and no file in --videos tells how many make a second")
        return None

    def listed(self, where: str, entry: Mapping[str, Any], key: str) -> list[Any]:
        """The list at `key`, empty where there is none; a value that is no list is counted and named."""
        value = entry.get(key, [])
        if isinstance(value, list):
            return value
        self.leave_out(where, f"its {key} is {brief(value)}, no list")
        return []

    def leave_out(self, where: str, reason: str) -> None:
        """Count and name something that is not in the result."""
        self.left_out.append(f"{where}: {reason}")

    def note(self, text: str) -> None:
        """Tell the user, once."""
        self.notes[text] = None


def video_id_of(name: str) -> str:
    """The id in a file name, path or address: without folders and without the suffix of a video file; "" if none."""
    return _parts(name)[0]


def _parts(name: str) -> tuple[str, str, str, list[str]]:
    """(id, suffix of a video file, query that may tell the video, folders from the inside out) of a name."""
    name, query = name.strip(), ""
    if "://" in name or "?d=" in name or "watch?v=" in name:
        try:
            address = urlsplit(name)
        except ValueError:
            return "", "", "", []
        path, values = unquote(address.path), parse_qs(address.query)
        if path.endswith("/") and "d" in values:  # Label Studio's local files
            name = values["d"][0]
        elif path.rstrip("/").endswith("watch") and "v" in values:
            name = values["v"][0]
        else:
            name = f"{address.netloc}/{path}"
            query = "" if name.lower().endswith(VIDEO_SUFFIXES) else address.query
    *folders, last = re.split(r"[/\\]", name)
    if "/upload/" in name and (upload := re.match(r"([0-9a-f]{8})-(.+)", last)):  # Label Studio names each upload so
        folders, last = [*folders, upload[1]], upload[2]
    video_id = plain_id(last)
    return video_id, last[len(video_id) :].lower(), query, [one for one in folders[::-1] if one not in ("", ".", "..")]


def as_seconds(value: Any) -> float | None:
    """Seconds from a number, or a text such as "3.7", "3,7", "01:02.5" or "1:02:03,500"; None for anything else."""
    if isinstance(value, str) and (clock := _CLOCK.fullmatch(value.strip())):
        hours, minutes, seconds = clock.groups()
        parts = int(hours or 0), int(minutes), float(seconds.replace(",", "."))
        return parts[0] * 3600.0 + parts[1] * 60 + parts[2] if parts[2] < 60 and (not hours or parts[1] < 60) else None
    return as_number(value)


def as_number(value: Any) -> float | None:
    """A finite number, also one in a text, with a decimal point or comma; None for anything else."""
    if isinstance(value, str):
        value = value.strip().replace(",", ".") if _NUMBER.fullmatch(value.strip()) else None
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def subset_in_name(path: Path) -> str | None:
    """The one subset that a file's name tells, such as train.csv; None where it tells none, or two."""
    found = {SUBSETS[word] for word in _SUBSET_WORD.findall(path.stem.lower())}
    return found.pop() if len(found) == 1 else None


def dictionary(value: Any) -> Mapping[str, Any]:
    """`value` if it is an object of JSON, else an empty one."""
    return value if isinstance(value, dict) else {}


def items(value: Any) -> Iterable[Any]:
    """`value` if it is a list, else an empty one."""
    return value if isinstance(value, list) else ()
