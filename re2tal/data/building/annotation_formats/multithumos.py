"""The JSON of MultiTHUMOS and of Charades, as I3D loaders share it, and Charades' own CSV.

    {id: {"subset", "duration", "actions": [[class number, start, end]]}}
    id,...,actions,length      with actions such as "c092 11.90 21.20;c147 0.00 12.60"

Numbers of classes count from 1 in MultiTHUMOS and from 0 in Charades: --classes gives their names.
"""

from __future__ import annotations

import re

from re2tal.data.building.annotation_formats.found import Found, Source, dictionary, items, subset_in_name

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
    numbers = [one[0] for entry in content.values() for one in items(entry["actions"]) if one and isinstance(one, list)]
    first = 0 if 0 in numbers else 1
    for name, entry in content.items():
        where = f"{source.path.name} {name[:100]}"
        subset = entry.get("subset")
        subset = _SUBSETS.get(subset, subset) if isinstance(subset, str) else None
        found.video(name, subset=subset, duration=entry.get("duration"))
        for position, action in enumerate(items(entry["actions"])):
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
    for where, row in source.records(*table):
        found.video(row["id"], subset="validation" if subset == "test" else subset, duration=row["length"])
        for part in filter(None, (part.strip() for part in row["actions"].split(";"))):
            words = part.split()
            if len(words) == 3 and re.fullmatch(r"c\d{3}", words[0]):
                name = _class_name(int(words[0][1:]), 0, found) if found.wanted.classes else words[0]
                found.action(where, row["id"], words[1], words[2], name)
            else:
                found.leave_out(where, f"its action {part[:60]!r} is no class, start and end")


def _class_name(number: object, first: int, found: Found) -> object:
    """The name of class `number`, which counts from `first`."""
    if not isinstance(number, int) or isinstance(number, bool):
        return number
    if not found.wanted.classes:
        found.note("classes are numbers in the file, and so are labels; give --classes FILE, with one name per line")
        return str(number)
    index = number - first
    return found.wanted.classes[index] if 0 <= index < len(found.wanted.classes) else None
