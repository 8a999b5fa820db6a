"""What readers share: the file that is read, what was asked, and what was found.

A row that cannot be read is left out and named; it never ends the job.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from re2tal.data.building.labels import is_label
from re2tal.strict_json import brief, finite_number
from re2tal.structures import SUBSETS, find_subset
from re2tal.video_ids import VIDEO_SUFFIXES, plain_id

_CLOCK = re.compile(r"(?:(\d+):)?(\d+):(\d{1,2}(?:[.,]\d+)?)", re.ASCII)
_DECIMAL_COMMA = re.compile(r"([+-]?\d+),(\d+(?:[eE][+-]?\d+)?)", re.ASCII)
_UNCLEAR = re.compile(r"[+-]?[1-9]\d{0,2},\d{3}", re.ASCII)
"""A comma before three digits: decimals to some, thousands to others."""
_SUBSET_WORD = re.compile(rf"(?<![a-z])({'|'.join(sorted(SUBSETS, key=len, reverse=True))})(?![a-z])")


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
    measure: Callable[[str], tuple[float, float | None] | None] | None = None
    """Id -> (duration in seconds, frames per second) of the video's file, None where there is none; no rate where its
    frames come unevenly."""
    videos: dict[str, FoundVideo] = field(default_factory=dict)
    durations: dict[str, float] = field(default_factory=dict)
    """Seconds of videos from a table of its own, whether or not they are among the videos."""
    left_out: list[str] = field(default_factory=list)
    """Where, and why: a sentence for each row that is not in the result."""
    notes: dict[str, None] = field(default_factory=dict)
    """What else a person should know; each once."""
    clashes: dict[str, str] = field(default_factory=dict)
    """Id -> what stands in the way of writing it: two names that give it, or two subsets."""
    _names: dict[str, str] = field(default_factory=dict)
    """Id -> the longest name it came from."""

    def video(
        self,
        name: str,
        *,
        subset: str | None = None,
        duration: Any = None,
        is_known: bool = True,
        frame: Any = None,
        fps: Any = None,
    ) -> FoundVideo:
        """The entry of a video file or id; what is known of it is added, and what is no number is told."""
        video_id = video_id_of(name)
        if not video_id:
            self.leave_out(brief(name), "it names no video")
            return FoundVideo()
        one = self.videos.setdefault(video_id, FoundVideo())
        self._check_name(video_id, name)
        subset = (subset or "").strip() or None
        if one.subset and subset and find_subset(subset, [one.subset]) is None:
            self.clashes.setdefault(video_id, f"it is in {one.subset!r} and in {subset!r}: keep one")
        one.subset = one.subset or subset
        seconds = as_seconds(duration)
        if one.duration_seconds is None and seconds is not None and seconds > 0:
            one.duration_seconds = seconds
        # 0 stands for an unknown length in many exports.
        if duration not in (None, "") and (seconds is None or seconds < 0):
            what = "decimals or thousands?" if is_unclear(duration) else "no seconds, mm:ss or hh:mm:ss"
            self.note(f"the duration of {brief(video_id)} is {brief(duration)}, and is not taken: {what}")
        for key, value in (("frame", frame), ("fps", fps)):
            if number := as_number(value):
                one.facts[key] = int(number) if number == int(number) else number
            elif number is None and value not in (None, ""):
                self.note(f"{key} of {brief(video_id)} is {brief(value)}, and is not taken: no number")
        one.is_known |= is_known
        return one

    def action(self, where: str, name: str, start: Any, end: Any, label: Any, *, subset: str | None = None) -> None:
        """Add one segment, in seconds or as a clock shows them; or leave it out and say why."""
        start_seconds, end_seconds = as_seconds(start), as_seconds(end)
        text = " ".join(label.split()) if isinstance(label, str) else label
        if not isinstance(name, str) or not video_id_of(name):
            self.leave_out(where, "it names no video" if not name else f"its video {brief(name)} is no name of a file")
        elif start_seconds is None or end_seconds is None:
            what = (
                "decimals or thousands? Write decimals with a point"
                if is_unclear(start) or is_unclear(end)
                else ("no seconds, mm:ss or hh:mm:ss")
            )
            self.leave_out(where, f"its times are {brief(start)} and {brief(end)}: {what}")
        elif not is_label(text):
            self.leave_out(where, f"its label is {brief(label)}: no name of 1 to 200 printable characters")
        elif end_seconds <= start_seconds:
            what = "is reversed" if end_seconds < start_seconds else "lasts no time"
            self.leave_out(where, f"its segment {start_seconds:g} to {end_seconds:g} s {what}")
        elif start_seconds < 0:
            self.leave_out(where, f"its segment {start_seconds:g} to {end_seconds:g} s starts before the video")
        else:
            # Microseconds: what dividing by a rate leaves behind would be written out in 17 digits.
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
            self.clashes.setdefault(video_id, f"{known!r} and {name!r} both give this id: rename one")
        # The longer name is kept, as it can contradict more.
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
        measured = self.measure(video_id_of(name))
        if measured is not None and measured[1] is None:
            what = "those of its file come unevenly, or begin after its sound; give seconds, or --fps"
            self.leave_out(where, f"its times are frames, and {what}")
        elif measured is None:
            self.leave_out(where, "its times are frames, and no file in --videos tells how many make a second")
        return measured[1] if measured else None

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
    if name.lower().startswith(("s3://", "gs://", "azure-blob://")):
        name = name.partition("://")[2]  # the key of a bucket is a name as it stands, with its % and #
    elif "://" in name or "?d=" in name or "watch?v=" in name:
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
    """A finite number, also one in a text, with a decimal point or comma; None for anything else, and for "1,000"."""
    return None if is_unclear(value) else as_decimal(value)


def as_decimal(value: Any) -> float | None:
    """As `as_number`, where any comma is known to stand before decimals."""
    if isinstance(value, str) and (comma := _DECIMAL_COMMA.fullmatch(value.strip())):
        value = f"{comma[1]}.{comma[2]}"
    return finite_number(value)


def is_unclear(value: Any) -> bool:
    """Whether this is a text such as "1,000", which may be one or a thousand."""
    return isinstance(value, str) and _UNCLEAR.fullmatch(value.strip()) is not None


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
