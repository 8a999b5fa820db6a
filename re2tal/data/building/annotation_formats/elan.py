"""ELAN's .eaf: tiers of annotations between time slots in milliseconds; and its tab-delimited export with names.

The label is the annotation's value, or its tier's name where it has none, or always with --label tier. A medium that
starts later than the recording has a TIME_ORIGIN: milliseconds of the medium at time 0 of the annotations.
"""

from __future__ import annotations

from xml.etree.ElementTree import Element

from re2tal.data.building.annotation_formats.found import Found, as_number, as_seconds
from re2tal.data.building.annotation_formats.source import Source

_UNITS = ("- hh:mm:ss.ms", "- ss.msec", "- msec")


def is_elan(source: Source) -> bool:
    """The root element."""
    return source.xml is not None and source.xml.tag == "ANNOTATION_DOCUMENT"


def read_elan(source: Source, found: Found) -> None:
    """Add the annotations of all tiers, or of those that are wanted."""
    root = source.xml
    assert root is not None
    header = root.find("HEADER")
    if header is not None and (units := header.get("TIME_UNITS", "milliseconds")) != "milliseconds":
        raise ValueError(f"{source.path} has times in {units}, not in milliseconds; save it in ELAN's present version")
    name, origin = _medium(source, root, found)
    slots = {slot.get("TIME_SLOT_ID"): as_number(slot.get("TIME_VALUE")) for slot in root.iter("TIME_SLOT")}
    by_id = {
        one.get("ANNOTATION_ID"): one for one in [*root.iter("ALIGNABLE_ANNOTATION"), *root.iter("REF_ANNOTATION")]
    }
    found.video(name)
    tiers = [tier for tier in root.iter("TIER") if not found.wanted.tiers or tier.get("TIER_ID") in found.wanted.tiers]
    if not tiers:
        there = [tier.get("TIER_ID") for tier in root.iter("TIER")]
        raise ValueError(f"{source.path} has none of the tiers {sorted(found.wanted.tiers)}; it has {there}")
    for tier in tiers:
        tier_name = tier.get("TIER_ID") or ""
        for one in (*tier.iter("ALIGNABLE_ANNOTATION"), *tier.iter("REF_ANNOTATION")):
            where = f"{source.path.name} tier {tier_name!r} annotation {one.get('ANNOTATION_ID')}"
            aligned = _aligned(one, by_id)
            times = [slots.get(aligned.get(f"TIME_SLOT_REF{end}")) for end in (1, 2)] if aligned is not None else []
            if len(times) != 2 or times[0] is None or times[1] is None:
                found.leave_out(where, "one of its ends is at no time")
                continue
            value = (one.findtext("ANNOTATION_VALUE") or "").strip()
            label = tier_name if found.wanted.label == "tier" or not value else value
            found.action(where, name, (times[0] + origin) / 1000, (times[1] + origin) / 1000, label)


def is_elan_table(source: Source) -> bool:
    """Columns such as "Begin Time - ss.msec" in the first row."""
    header = source.rows[0] if source.rows else []
    return all(any(cell.startswith(name) for cell in header) for name in ("Begin Time - ", "End Time - "))


def read_elan_table(source: Source, found: Found) -> None:
    """Add the annotations of all columns that are no times: a column per tier, or one for all beside Tier's."""
    header = source.rows[0]
    begin, end = (
        next(i for i, cell in enumerate(header) if cell.startswith(name)) for name in ("Begin Time", "End Time")
    )
    times = ("Begin Time - ", "End Time - ", "Duration - ")
    if odd := [header[i] for i in (begin, end) if not header[i].endswith(_UNITS)]:
        raise ValueError(f"{source.path} has times as {odd[0]!r}; export them as ss.msec")
    if files := {"File", "File Name", "File Path"} & set(header):
        raise ValueError(f"{source.path} has a column {min(files)!r}, of several videos; export each file on its own")
    named = header.index("Tier") if "Tier" in header else None
    columns = [
        i for i, cell in enumerate(header) if cell not in ("", "Tier", "Participant") and not cell.startswith(times)
    ]
    rows = [
        (number, [*row, *[""] * (len(header) - len(row))])
        for number, row in enumerate(source.rows[1:], start=2)
        if any(row)
    ]
    there = {header[i] for i in columns} if named is None else {cells[named] for _, cells in rows}
    if found.wanted.tiers and not found.wanted.tiers & there:
        raise ValueError(f"{source.path} has none of the tiers {sorted(found.wanted.tiers)}; it has {sorted(there)}")
    found.note(f"{source.path.name} names no video; its own name is taken")
    for number, cells in rows:
        where = f"{source.path.name} row {number}"
        if any(cells[len(header) :]):
            found.leave_out(where, f"it has {len(cells)} cells, more than the header's {len(header)}")
            continue
        first, last = _seconds(header[begin], cells[begin]), _seconds(header[end], cells[end])
        for column in columns:
            tier = header[column] if named is None else cells[named]
            if cells[column] and (not found.wanted.tiers or tier in found.wanted.tiers):
                label = tier if found.wanted.label == "tier" else cells[column]
                found.action(where, source.path.stem, first, last, label)


def _seconds(column: str, text: str) -> float | str:
    """Seconds of a cell; the text where it is no time."""
    value = as_seconds(text)
    return text if value is None else value / 1000 if column.endswith("- msec") else value


def _aligned(one: Element, by_id: dict[str | None, Element]) -> Element | None:
    """The annotation that has the times: itself, or the one that it refers to, at any depth."""
    # No more steps than annotations: references in a damaged file may go round in a circle.
    for _ in range(len(by_id) + 1):
        if one.tag == "ALIGNABLE_ANNOTATION":
            return one
        parent = by_id.get(one.get("ANNOTATION_REF"))
        if parent is None:
            return None
        one = parent
    return None


def _medium(source: Source, root: Element, found: Found) -> tuple[str, float]:
    """(name, time origin in milliseconds) of the first video; the file's own name where it names none."""
    media = list(root.iter("MEDIA_DESCRIPTOR"))
    media = [one for one in media if not (one.get("MIME_TYPE") or "").startswith("audio")] or media
    if len(media) > 1:
        found.note(f"{source.path.name} has {len(media)} media; its annotations are taken for the first")
    name = (media[0].get("MEDIA_URL") or media[0].get("RELATIVE_MEDIA_URL") or "") if media else ""
    if not name:
        found.note(f"{source.path.name} names no video; its own name is taken")
        return source.path.stem, 0.0
    return name, as_number(media[0].get("TIME_ORIGIN")) or 0.0
