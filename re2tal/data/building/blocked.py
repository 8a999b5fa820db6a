"""Lists of videos that are left out on purpose, as `re2tal evaluate` reads them: with or without v_ and suffix."""

from __future__ import annotations

from pathlib import Path

from re2tal.data.building.annotations import Annotations, read_video_ids
from re2tal.data.building.clips import ClipList
from re2tal.video_ids import match_ids


def read_blocked(path: Path | None, listed: Annotations | ClipList) -> tuple[frozenset[str], tuple[str, ...]]:
    """(ids of the listed videos that a file names, what there is to say: a sentence each)."""
    if path is None:
        return frozenset(), ()
    known = {record.video_id for records in listed.subsets.values() for record in records}
    given = read_video_ids(path)
    as_here = match_ids(given, known)
    strangers = sorted(given - known - as_here.keys())
    notes: tuple[str, ...] = ()
    if strangers:
        shown = ", ".join(map(repr, strangers[:3])) + (", ..." if len(strangers) > 3 else "")
        notes = (f"{len(strangers)} of {len(given)} ids to leave out are listed nowhere: {shown}",)
    return frozenset((given & known) | set(as_here.values())), notes
