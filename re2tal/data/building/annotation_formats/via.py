"""VIA 3's project JSON: segments `z` in seconds, and attributes whose values are mostly numbers of options.

    attribute {id: {aname, type, options {number: text}}}, file {id: {fname}}, view {id: {fid_list}},
    metadata {id: {vid, z: [start, end], xy, av {attribute id: value}}}

Each file of a view gets its segments. Whole files, single pictures and regions of a picture are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from re2tal.data.building.annotation_formats.found import Found, dictionary, items
from re2tal.data.building.annotation_formats.source import Source

# VIA's number of the type.
_CHECKBOX = 2


def is_via(source: Source) -> bool:
    """Its four tables."""
    return {"attribute", "file", "view", "metadata"} <= set(dictionary(source.json))


def read_via(source: Source, found: Found) -> None:
    """Add the segments."""
    project = dictionary(source.json)
    if odd := [key for key in ("attribute", "file", "view", "metadata") if not isinstance(project[key], dict)]:
        raise ValueError(f"{source.path}: its {', '.join(odd)} is no object")
    attributes = _temporal(source, dictionary(project["attribute"]), found)
    files = {key: dictionary(one).get("fname") for key, one in dictionary(project["file"]).items()}
    views = {key: list(items(dictionary(one).get("fid_list"))) for key, one in dictionary(project["view"]).items()}
    for key, one in dictionary(project["metadata"]).items():
        where, entry = f"{source.path.name} {key}", dictionary(one)
        names = [name for file in views.get(str(entry.get("vid")), []) if isinstance(name := files.get(str(file)), str)]
        segment = list(items(entry.get("z")))
        if not names:
            found.leave_out(where, f"its view {entry.get('vid')!r} names no file")
        elif len(segment) != 2 or entry.get("xy"):
            what = "a region of a picture" if entry.get("xy") else "a moment" if segment else "a whole file"
            found.leave_out(where, f"it marks {what}, not a segment")
        else:
            labels = list(_labels(dictionary(entry.get("av")), attributes))
            if not labels:
                found.leave_out(where, "no attribute gives it a label")
            for label in labels:
                for name in names:
                    found.action(where, name, segment[0], segment[1], label)


def _temporal(source: Source, attributes: Mapping[str, Any], found: Found) -> dict[str, Mapping[str, Any]]:
    """The attributes that label segments: the one that is wanted, or all."""
    by_id = {key: dictionary(one) for key, one in attributes.items()}
    names = [str(one.get("aname")) for one in by_id.values()]
    if found.wanted.label is not None:
        chosen = {key: one for key, one in by_id.items() if one.get("aname") == found.wanted.label}
        if not chosen:
            raise ValueError(f"{source.path} has no attribute {found.wanted.label!r}; it has {names}")
        return chosen
    # VIA's word for an attribute of a segment in time.
    chosen = {key: one for key, one in by_id.items() if "Z2" in str(one.get("anchor_id", "Z2"))} or by_id
    if len(chosen) > 1:
        names = [str(one.get("aname")) for one in chosen.values()]
        found.note(f"{source.path.name}: labels come from the attributes {names}; --label NAME takes one of them")
    return chosen


def _labels(values: Mapping[str, Any], attributes: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    for key, attribute in attributes.items():
        value, options = values.get(key), dictionary(attribute.get("options"))
        if value == "_DEFAULT":
            value = attribute.get("default_option_id")
        if not isinstance(value, str) or not value:
            continue
        chosen = value.split(",") if attribute.get("type") == _CHECKBOX else [value]
        # Text attributes have no options; a number that is none of them names nothing.
        yield from (str(options.get(one, "" if options and one not in options.values() else one)) for one in chosen)
