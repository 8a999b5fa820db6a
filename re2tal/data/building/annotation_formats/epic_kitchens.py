"""EPIC-Kitchens-100: `EPIC_100_train.csv` and its like, and `EPIC_100_video_info.csv`, which has the durations.

A label is the number of the verb or noun as OpenTAD writes it, such as id_003. Times are those of the video, not
`start_frame` and `stop_frame`, which count extracted frames at another rate. Test rows have no verbs and nouns.
"""

from __future__ import annotations

from re2tal.data.building.annotation_formats.found import Found, as_number, subset_in_name
from re2tal.data.building.annotation_formats.source import Source

_TIMES = ("video_id", "start_timestamp", "stop_timestamp")
_INFO = ("video_id", "duration", "fps", "resolution")


def is_epic(source: Source) -> bool:
    """A table with the columns of segments."""
    return source.table(*_TIMES) is not None


def is_epic_info(source: Source) -> bool:
    """The table of videos."""
    return source.table(*_INFO) is not None


def read_epic(source: Source, found: Found) -> None:
    """Add the segments, of verbs or of nouns."""
    table = source.table(*_TIMES)
    assert table is not None
    has_labels = bool({"verb_class", "noun_class"} & set(table[1]))
    kind = found.wanted.label
    if has_labels and kind not in ("verb", "noun"):
        raise ValueError(f"{source.path}: its label is {kind or 'not chosen'}; give --label verb or --label noun")
    if has_labels and f"{kind}_class" not in table[1]:
        raise ValueError(f"{source.path} has no column {kind}_class; it has {', '.join(table[1])}")
    subset = subset_in_name(source.path)
    for where, row in source.records(*table, found.leave_out):
        if not has_labels:
            found.video(row["video_id"], subset=subset, is_known=False)
            continue
        number = as_number(row[f"{kind}_class"])
        label = f"id_{int(number):03d}" if number is not None and number >= 0 and number == int(number) else None
        found.action(where, row["video_id"], row["start_timestamp"], row["stop_timestamp"], label, subset=subset)


def read_epic_info(source: Source, found: Found) -> None:
    """Remember durations; a video without a segment is in no subset and comes in none."""
    table = source.table(*_INFO)
    assert table is not None
    for where, row in source.records(*table, found.leave_out):
        if (seconds := as_number(row["duration"])) is None:
            found.leave_out(where, f"its duration is {row['duration'][:60]!r}: no number of seconds")
        else:
            found.durations[row["video_id"]] = seconds
