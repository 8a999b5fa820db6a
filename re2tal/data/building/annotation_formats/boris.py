"""BORIS: tabular events (a row START, a row STOP), aggregated events (a row each), and projects (.boris, JSON).

A START is paired with the next STOP of the same observation, subject, behavior and modifiers. Point events have no
duration and are left out. The label is the behavior; --label category takes its category.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from re2tal.data.building.annotation_formats.found import Found, as_decimal, as_number, dictionary, items
from re2tal.data.building.annotation_formats.source import Source

_STATUS = ("behavior type", "status")
_OFFSET = "it has a time offset of {} s, and nothing tells whether its times hold it; set it to 0 in BORIS"
_PLAYERS = re.compile(r"player #\d+:")


class _Event(NamedTuple):
    where: str
    video: str
    key: tuple[str, ...]
    """What START and STOP have in common."""
    kind: str
    """START, STOP, POINT, or STATE where the project does not say which."""
    seconds: float | str | None
    label: str


def is_boris_table(source: Source) -> bool:
    """A header with a behavior, and with its times or its kind."""
    return _table(source) is not None


def is_boris_project(source: Source) -> bool:
    """Observations and the configuration of behaviors."""
    return {"observations", "behaviors_conf"} <= set(dictionary(source.json))


def read_boris_table(source: Source, found: Found) -> None:
    """Add the events of either export."""
    table = _table(source)
    assert table is not None
    if "start (s)" not in table[1]:
        _pair(_tabular(source, table, found), found)
        return
    for where, row, name in _of_one_video(source, table, found):
        if row.get("behavior type", "").upper() == "POINT" or row["start (s)"] == row["stop (s)"]:
            found.leave_out(where, f"{row['behavior']!r} is a point event")
        else:
            found.video(name, duration=_duration(row))
            start, stop = _time(source, row["start (s)"]), _time(source, row["stop (s)"])
            found.action(where, name, start, stop, _label(row, found))


def read_boris_project(source: Source, found: Found) -> None:
    """Add the events of all observations that have one media file."""
    project = dictionary(source.json)
    if not isinstance(project["observations"], dict):
        raise ValueError(f"{source.path} has observations that are no object")
    behaviors = {str(one.get("code")): one for one in map(dictionary, dictionary(project["behaviors_conf"]).values())}
    for name, one in dictionary(project["observations"]).items():
        observation, where = dictionary(one), f"{source.path.name} observation {name!r}"
        files = [file for player in dictionary(observation.get("file")).values() for file in items(player)]
        if len(files) != 1 or not isinstance(files[0], str):
            found.leave_out(where, f"it has {len(files)} media files, and times that run on over them")
            continue
        if offset := as_number(observation.get("time offset")):
            found.leave_out(where, _OFFSET.format(offset))
            continue
        lengths = dictionary(dictionary(observation.get("media_info")).get("length"))
        found.video(files[0], duration=lengths.get(files[0]))
        _pair(_of_project(where, files[0], observation, behaviors, found), found)


def _of_project(
    where: str, video: str, observation: Mapping[str, Any], behaviors: Mapping[str, Mapping[str, Any]], found: Found
) -> Iterator[_Event]:
    for number, event in enumerate(found.listed(where, observation, "events")):
        here = f"{where} event {number}"
        if not isinstance(event, list) or len(event) < 4:
            found.leave_out(here, "it is no [time, subject, behavior, modifiers, ...]")
            continue
        time, subject, code, modifiers = event[:4]
        behavior = dictionary(behaviors.get(str(code)))
        kind = "POINT" if "point" in str(behavior.get("type")).lower() else "STATE"
        label = str(behavior.get("category", "")) if found.wanted.label == "category" else str(code)
        yield _Event(here, video, (video, str(subject), str(code), str(modifiers)), kind, as_number(time), label)


def _of_one_video(
    source: Source, table: tuple[int, list[str]], found: Found
) -> Iterator[tuple[str, dict[str, str], str]]:
    """(where, row, media file) in their order. Several media files in an observation are one after the other in time:
    no row says where each begins, so their rows are left out."""
    files: dict[str, set[str | None]] = {}
    rows = [(where, row, _video(row, found, where)) for where, row in source.records(*table, found.leave_out)]
    for _, row, name in rows:
        files.setdefault(row.get("observation id", ""), set()).add(name)
    for where, row, name in rows:
        if name is None:
            continue
        if as_number(row.get("time offset (s)")):
            found.leave_out(where, _OFFSET.format(row["time offset (s)"]))
        elif len(files[row.get("observation id", "")]) > 1 and "observation id" in row:
            found.leave_out(where, "its observation has several media files, and times that run on over them")
        else:
            yield where, row, name


def _tabular(source: Source, table: tuple[int, list[str]], found: Found) -> Iterator[_Event]:
    status = next(one for one in _STATUS if one in table[1])
    shared = ("observation id", "subject", "behavior")
    for where, row, name in _of_one_video(source, table, found):
        found.video(name, duration=_duration(row))
        modifiers = (row[one] for one in row if one.startswith("modifier"))
        key = (name, *(row.get(one, "") for one in shared), *modifiers)
        yield _Event(where, name, key, row[status].upper(), _time(source, row["time"]), _label(row, found))


def _pair(events: Iterable[_Event], found: Found) -> None:
    """Add a segment for each START with its STOP."""
    started: dict[tuple[str, ...], _Event] = {}
    for event in events:
        # A project says no START or STOP: every second event of a key ends it.
        is_stop = event.kind == "STOP" or (event.kind == "STATE" and event.key in started)
        if event.kind not in ("START", "STOP", "STATE"):
            found.leave_out(event.where, f"{event.label!r} is a point event")
        elif is_stop and (start := started.pop(event.key, None)) is not None:
            found.action(start.where, event.video, start.seconds, event.seconds, event.label)
        elif is_stop:
            found.leave_out(event.where, f"{event.label!r} stops without a start")
        else:
            if earlier := started.get(event.key):
                found.leave_out(earlier.where, f"{event.label!r} starts and never stops")
            started[event.key] = event
    for event in started.values():
        found.leave_out(event.where, f"{event.label!r} starts and never stops")


def _video(row: Mapping[str, str], found: Found, where: str) -> str | None:
    """The one media file of a row; None, said once, where there are several."""
    media = row.get("media file name") or row.get("media file path") or row.get("media file")
    if not media or media == "NA":
        players = [part for part in _PLAYERS.split(row.get("source", "")) if part.strip(" |;")]
        media = players[0].strip(" |") if len(players) == 1 else ""
        if ";" in media or len(players) > 1:
            found.leave_out(where, f"its source names several media files: {row['source'][:80]}")
            return None
    return media or row.get("observation id", "")


def _time(source: Source, text: str) -> float | str:
    """Seconds of a cell; the text where it is no number. Between semicolons a comma stands before decimals."""
    seconds = as_decimal(text) if source.delimiter == ";" else as_number(text)
    return text if seconds is None else seconds


def _duration(row: Mapping[str, str]) -> str | None:
    return row.get("media duration (s)") or row.get("total length")


def _label(row: Mapping[str, str], found: Found) -> str:
    return row.get("behavioral category", "") if found.wanted.label == "category" else row["behavior"]


def _table(source: Source) -> tuple[int, list[str]] | None:
    tables = (("behavior", "start (s)", "stop (s)"), *(("behavior", "time", one) for one in _STATUS))
    return next((table for one in tables if (table := source.table(*one)) is not None), None)
