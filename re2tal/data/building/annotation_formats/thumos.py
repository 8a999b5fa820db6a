"""THUMOS14's text files, one per class and subset: `BaseballPitch_val.txt` with lines "video start end" in seconds.

Subsets are called as recipes look for them: the official validation set is "training", the test set "validation".
"""

from __future__ import annotations

import re

from re2tal.data.building.annotation_formats.found import Found
from re2tal.data.building.annotation_formats.source import Source

_LINE = re.compile(r"(\S+)\s+(\d+(?:\.\d+)?)\s+(\d+(?:\.\d+)?)")
_SUBSETS = {"val": "training", "test": "validation"}


def is_thumos(source: Source) -> bool:
    """Text whose first line is a name and two numbers, apart by blanks."""
    if source.kind != "text":
        return False
    first = next((line.strip() for line in source.lines if line.strip()), "")
    return _LINE.fullmatch(first) is not None


def read_thumos(source: Source, found: Found) -> None:
    """Add the videos of one class; its name is the file's."""
    label, _, subset = source.path.stem.rpartition("_")
    if subset not in _SUBSETS:
        label, subset = source.path.stem, ""
    for number, line in enumerate(source.lines, start=1):
        where = f"{source.path.name} line {number}"
        if row := _LINE.fullmatch(line.strip()):
            by_name = re.match(r"video_(val|test)", row[1])
            found.action(where, row[1], row[2], row[3], label, subset=_SUBSETS.get(by_name[1] if by_name else subset))
        elif line.strip():
            found.leave_out(where, f"{line.strip()[:60]!r} is no video, start and end")
