"""The JSON of MultiTHUMOS and of Charades, as I3D loaders share it, and Charades' own CSV.

    {id: {"subset", "duration", "actions": [[class number, start, end]]}}
    id,...,actions,length      with actions such as "c092 11.90 21.20;c147 0.00 12.60"

Numbers of classes count from 1 in MultiTHUMOS and from 0 in Charades: --classes gives their names, and numbers too if
its lines are such as "1 BaseballPitch" or "c000 Holding some clothes".
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from re2tal.data.building.annotation_formats.found import Found, dictionary, items, subset_in_name
from re2tal.data.building.annotation_formats.source import Source

_SUBSETS = {"testing": "validation"}
"""Neither has a third subset, and recipes look for this name."""


def is_actions(source: Source) -> bool:
    """Videos by id with `actions`."""
    content = dictionary(source.json)
    return bool(content) and all(isinstance(one, dict) and "actions" in one for one in content.values())


def is_charades(source: Source) -> bool:
    """A table with the columns id, actions and length."""
    return source.table("id", "actions", "length") is not None


def read_actions(source: Source, found: Found) -> None:
    """Add the videos of the JSON."""
    content = dictionary(source.json)
    first = _first(source, content, found)
    for name, entry in content.items():
        where = f"{source.path.name} {name[:100]}"
        subset = entry.get("subset")
        subset = _SUBSETS.get(subset, subset) if isinstance(subset, str) else None
        is_known = isinstance(entry["actions"], list)
        found.video(name, subset=subset, duration=entry.get("duration"), is_known=is_known)
        for position, action in enumerate(found.listed(where, entry, "actions")):
            here = f"{where} action {position}"
            if isinstance(action, list) and len(action) == 3:
                found.action(here, name, action[1], action[2], _class_name(action[0], first, found))
            else:
                found.leave_out(here, "it is no [class, start, end]")


def read_charades(source: Source, found: Found) -> None:
    """Add the videos of the CSV."""
    table = source.table("id", "actions", "length")
    assert table is not None
    subset = subset_in_name(source.path)
    for where, row in source.records(*table, found.leave_out):
        found.video(row["id"], subset="validation" if subset == "test" else subset, duration=row["length"])
        for part in filter(None, (part.strip() for part in row["actions"].split(";"))):
            words = part.split()
            if len(words) == 3 and re.fullmatch(r"c\d{3}", words[0]):
                name = _class_name(int(words[0][1:]), 0, found) if found.wanted.classes else words[0]
                found.action(where, row["id"], words[1], words[2], name)
            else:
                found.leave_out(where, f"its action {part[:60]!r} is no class, start and end")


def _first(source: Source, content: Mapping[str, Any], found: Found) -> int:
    """The number of the first class in the JSON; ValueError where nothing tells it, and it matters."""
    actions = [one for entry in content.values() for one in items(entry["actions"])]
    numbers = {one[0] for one in actions if isinstance(one, list) and one and isinstance(one[0], int)}
    count = len(found.wanted.classes)
    if not count or found.wanted.numbers or not numbers or 0 in numbers:
        return 0
    # As many classes as the highest number: it counts from 1.
    if count in numbers:
        return 1
    raise ValueError(
        f"{source.path} has the classes {min(numbers)} to {max(numbers)}, and --classes names {count}: they may count "
        'from 0 or from 1; write numbers into --classes, such as "1 BaseballPitch" (MultiTHUMOS) or "c000 Holding some '
        'clothes" (Charades)'
    )


def _class_name(number: object, first: int, found: Found) -> object:
    """The name of class `number`, which counts from `first`."""
    if not isinstance(number, int) or isinstance(number, bool):
        return number
    if not found.wanted.classes:
        found.note("classes are numbers in the file, and so are labels; give --classes FILE, with one name per line")
        return str(number)
    if found.wanted.numbers:
        return dict(zip(found.wanted.numbers, found.wanted.classes, strict=True)).get(number)
    index = number - first
    return found.wanted.classes[index] if 0 <= index < len(found.wanted.classes) else None
