"""The formats that can be converted: a new one is a row in FORMATS."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from re2tal.data.building.annotation_formats import (
    activitynet,
    boris,
    csv_list,
    cvat,
    ego4d,
    elan,
    epic_kitchens,
    label_studio,
    multithumos,
    thumos,
    via,
)
from re2tal.data.building.annotation_formats.found import Found
from re2tal.data.building.annotation_formats.source import Source


@dataclass(frozen=True, slots=True)
class Format:
    """How a format is told from others, and read."""

    about: str
    """What people call it."""
    recognises: Callable[[Source], bool]
    read: Callable[[Source, Found], None]


FORMATS: dict[str, Format] = {
    "activitynet": Format(
        "ActivityNet's layout (HACS, FineAction, OpenTAD, ActionFormer)",
        activitynet.is_activitynet,
        activitynet.read_activitynet,
    ),
    "mmaction": Format("mmaction2's JSON", activitynet.is_mmaction, activitynet.read_activitynet),
    "multithumos": Format("MultiTHUMOS' or Charades' JSON", multithumos.is_actions, multithumos.read_actions),
    "ego4d": Format("Ego4D's moment queries", ego4d.is_ego4d, ego4d.read_ego4d),
    "via": Format("a VIA 3 project", via.is_via, via.read_via),
    "boris-project": Format("a BORIS project", boris.is_boris_project, boris.read_boris_project),
    "label-studio": Format("Label Studio's JSON", label_studio.is_label_studio, label_studio.read_label_studio),
    "elan": Format("ELAN's .eaf", elan.is_elan, elan.read_elan),
    "cvat": Format("CVAT for video", cvat.is_cvat, cvat.read_cvat),
    "elan-table": Format("ELAN's tab-delimited export", elan.is_elan_table, elan.read_elan_table),
    "boris": Format("BORIS' exported events", boris.is_boris_table, boris.read_boris_table),
    "epic": Format("EPIC-Kitchens-100's segments", epic_kitchens.is_epic, epic_kitchens.read_epic),
    "epic-info": Format(
        "EPIC-Kitchens-100's table of videos", epic_kitchens.is_epic_info, epic_kitchens.read_epic_info
    ),
    "charades": Format("Charades' CSV", multithumos.is_charades, multithumos.read_charades),
    "thumos": Format("THUMOS14's text files", thumos.is_thumos, thumos.read_thumos),
    "csv": Format("a table video, start, end, label", csv_list.is_csv, csv_list.read_csv),
}
"""Asked in this order: the first that recognises a file reads it."""


def recognise(source: Source) -> str | None:
    """The name of a file's format; None for one that no row knows. ValueError where it cannot be parsed."""
    return next((name for name, row in FORMATS.items() if row.recognises(source)), None)


def read_files(paths: Iterable[Path], *, format_name: str | None, found: Found) -> dict[Path, str]:
    """Add what the files say to `found`; gives the format of each that was read, and leaves the others out.

    ValueError for an unknown format.
    """
    if format_name is not None and format_name not in FORMATS:
        raise ValueError(f"unknown format {format_name!r}; known: {', '.join(FORMATS)}")
    read = {}
    for path in paths:
        try:
            source = Source(path)
            name = format_name or recognise(source)
            if format_name is not None and not FORMATS[format_name].recognises(source):
                found.leave_out(str(path), f"it is not {FORMATS[format_name].about}")
                continue
        except (ValueError, OSError) as error:
            found.leave_out(str(path), str(error).removeprefix(f"{path}: "))
            continue
        if name is None:
            found.leave_out(str(path), f"its format is not known; known: {', '.join(FORMATS)}")
            continue
        try:
            FORMATS[name].read(source, found)
            read[path] = name
        except ValueError as error:  # an option is missing, or what it names
            found.leave_out(str(path), str(error).removeprefix(f"{path} "))
        except Exception as error:  # one file, whatever is in it, never ends a job
            what = f"{type(error).__name__}: {error}"
            found.leave_out(str(path), f"it is not read past what its reader cannot take ({what[:200]})")
    return read


def hint(path: Path) -> str:
    """What to do with a file that is not in ActivityNet's layout: names its format if it is known."""
    try:
        name = recognise(Source(path))
    except (ValueError, OSError):
        name = None
    what = f"it looks like {FORMATS[name].about}" if name and name != "activitynet" else "if another tool wrote it"
    return f"{what}, convert it with `re2tal annotations convert {path} --out annotations.json`"
