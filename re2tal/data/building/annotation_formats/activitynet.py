"""The layout of ActivityNet, as HACS, FineAction, OpenTAD and ActionFormer write it too, and that of mmaction2.

    {"database": {id: {"subset", "duration", "frame"?, "fps"?, "annotations": [{"segment": [start, end], "label"}]}}}
    {id: {"duration_second", "duration_frame", "fps", "annotations": [{"segment": [start, end], "label"}]}}

HACS writes durations as strings. Test entries without `annotations` are videos of which no action is known.
"""

from __future__ import annotations

from re2tal.data.building.annotation_formats.found import Found, dictionary, items, subset_in_name
from re2tal.data.building.annotation_formats.source import Source

_KEYS = {"annotations", "duration", "duration_second"}


def is_activitynet(source: Source) -> bool:
    """An object `database`, or the same without it, in which every video says its subset."""
    content = dictionary(source.json)
    if isinstance(content.get("database"), dict):
        return True
    entries = [dictionary(one) for one in content.values()]
    return bool(entries) and all("subset" in one and "actions" not in one and _KEYS & set(one) for one in entries)


def is_mmaction(source: Source) -> bool:
    """Videos by id with `duration_second`."""
    content = dictionary(source.json)
    return bool(content) and all(isinstance(one, dict) and "duration_second" in one for one in content.values())


def read_activitynet(source: Source, found: Found) -> None:
    """Add the videos of either layout."""
    content = dictionary(source.json)
    for name, entry in dictionary(content.get("database", content)).items():
        where = f"{source.path.name} {name[:100]}"
        if not isinstance(entry, dict):
            found.leave_out(where, "it is no object with a subset, a duration and annotations")
            continue
        subset = entry.get("subset") or (subset_in_name(source.path) if "duration_second" in entry else None)
        found.video(
            name,
            subset=subset if isinstance(subset, str) else None,
            duration=entry.get("duration", entry.get("duration_second")),
            is_known=isinstance(entry.get("annotations"), list),
            frame=entry.get("frame", entry.get("duration_frame")),
            fps=entry.get("fps"),
        )
        for number, one in enumerate(found.listed(where, entry, "annotations")):
            segment = list(items(dictionary(one).get("segment")))
            start, end = segment if len(segment) == 2 else (None, None)
            found.action(f"{where} annotation {number}", name, start, end, dictionary(one).get("label"))
