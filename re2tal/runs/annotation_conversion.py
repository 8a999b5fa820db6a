"""Annotation files of other tools and of data sets in, ActivityNet's layout, or a table, out."""

from __future__ import annotations

import csv
import hashlib
import io
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from re2tal.data.building.annotation_entries import SUBSET_NAME, duration_tolerance
from re2tal.data.building.annotation_formats.formats import FORMATS, read_files
from re2tal.data.building.annotation_formats.found import Found, FoundVideo, Wanted
from re2tal.data.building.annotations import alike_subsets, repeated
from re2tal.data.building.isolated import Isolated
from re2tal.data.building.labels import fold_notes, one_spelling, read_class_list, twin_problems
from re2tal.data.building.named_files import NamedFiles, videos_in
from re2tal.data.building.probe import probe_video
from re2tal.files import output_file, write_atomically
from re2tal.runs.shard_listing import print_some
from re2tal.strict_json import write_json
from re2tal.tables import text_table
from re2tal.video_ids import id_fault, plain_id

SILENT_SECONDS = 60.0
"""Stop reading a video file after this time without progress."""


@dataclass(frozen=True, slots=True)
class Conversion:
    """What to convert, and how."""

    inputs: tuple[Path, ...]
    """Files to convert; of a folder, all files in it."""
    out: Path
    """File to write: JSON in ActivityNet's layout, or a table video,start,end,label,subset if it ends in .csv."""
    format: str | None = None
    """Format of all inputs, in place of what their content says; `re2tal annotations formats` lists them."""
    videos: Path | None = None
    """Folder of the video files, sub-folders too: gives durations, and frame rates for files that count frames."""
    fps: float | None = None
    """Frames per second, where files count frames; numbers in tables are then frames too."""
    subset: str | None = None
    """Subset of all videos whose file tells none; "training" if nothing is said."""
    validation: float = 0.0
    """Share of the videos without a subset that become "validation", chosen by their ids."""
    label: str | None = None
    """Which of several fields is the label: verb or noun (EPIC-Kitchens), tier (ELAN), category (BORIS), or the name of
    an attribute (VIA, CVAT)."""
    tiers: tuple[str, ...] = ()
    """Tiers of ELAN to take; all if none is named."""
    classes: Path | None = None
    """Text file with one class per line, for files whose classes are numbers (MultiTHUMOS, Charades)."""
    fix_labels: bool = False
    """Write labels that differ by case, space or Unicode form as one, and say so."""


def convert(options: Conversion) -> int:
    """Write the file and say what is in it; gives the exit status."""
    _refuse_wrong_options(options)
    out = output_file(options.out, option="--out")
    with _Videos(options.videos) as videos:
        found = Found(_wanted(options), videos.measure if options.videos else None)
        files = list(_files(options.inputs))
        # Also where a folder holds what an earlier conversion wrote: it would be read as annotations, once more.
        if any(one.exists() and out.exists() and one.samefile(out) for one in files):
            raise ValueError(f"--out {options.out} is among the files to convert; give another place, or remove it")
        read = read_files(files, format_name=options.format, found=found)
        for video_id, one in found.videos.items():
            if one.duration_seconds is None:
                measured = videos.measure(video_id) if options.videos else None
                # What a file tells comes before what was measured: its times belong to that copy of the video.
                one.duration_seconds = found.durations.get(video_id, measured[0] if measured else None)
    # Two files that contradict each other: neither is known to be right.
    for video_id, why in found.clashes.items():
        found.leave_out(f"video {video_id!r}", why)
        found.videos.pop(video_id, None)
    print_some([f"left out {line}" for line in found.left_out], more="left out")
    # Nothing is written: an empty file would look like a data set without actions.
    if not any(one.actions for one in found.videos.values()):
        names = ", ".join(sorted(set(read.values()))) or "no known format"
        raise ValueError(f"{len(found.left_out)} left out and no action found ({names}); {options.out} is not written")
    notes = [*videos.problems, *found.notes, *_unify(found, fix=options.fix_labels), *_assign(found, options)]
    notes += _later(found)
    if options.out.suffix.lower() == ".csv":
        notes += _lost_in_a_table(found)
        write_atomically(out, _table(found))
    else:
        write_json(out, _document(found))
    print_some([f"note: {note}" for note in notes], more="notes")
    for name, count in sorted(Counter(read.values()).items()):
        print(f"{count} file{'s' * (count > 1)} read as {name}: {FORMATS[name].about}")
    print(f"{options.out}: {_summary(found)}, {len(found.left_out)} left out")
    return 0


def list_formats() -> int:
    """Print a line per format; gives the exit status."""
    print(text_table([(name, row.about) for name, row in FORMATS.items()], align="<"))
    return 0


def _refuse_wrong_options(options: Conversion) -> None:
    if not 0 <= options.validation < 1:
        raise ValueError(f"--validation is {options.validation}; give a share from 0 to below 1")
    if options.fps is not None and not 0 < options.fps < 10_000:
        raise ValueError(f"--fps is {options.fps}; give the frames per second of the videos")
    if options.videos is not None and not options.videos.is_dir():
        raise ValueError(f"--videos {options.videos} is not a folder; give the folder that holds the videos")
    if options.out.suffix.lower() not in (".json", ".csv"):
        raise ValueError(f"--out {options.out} ends in neither .json nor .csv; give one of them")


def _wanted(options: Conversion) -> Wanted:
    names, numbers = _without_numbers(read_class_list(options.classes)) if options.classes else ((), ())
    return Wanted(
        label=options.label,
        tiers=frozenset(options.tiers),
        fps=options.fps,
        classes=names,
        numbers=numbers,
    )


def _without_numbers(lines: Sequence[str]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """(names, numbers) of lines such as "1 BaseballPitch" or "c000 Holding some clothes"; no numbers of others."""
    found = [match for line in lines if (match := re.fullmatch(r"c?(\d+)[\s,]+(.+)", line))]
    if len(found) < len(lines):
        # All lines or none: a class that is called "2 fast turns" must not lose its number.
        return tuple(lines), ()
    numbers = tuple(int(match[1]) for match in found)
    if len(set(numbers)) < len(numbers):
        raise ValueError("--classes gives one number to several names; give each its own")
    return tuple(match[2] for match in found), numbers


def _files(inputs: tuple[Path, ...]) -> Iterator[Path]:
    for path in inputs:
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist; check the path")
        # In order of names, so that two runs write the same file.
        inside = sorted(path.iterdir()) if path.is_dir() else [path]
        # What is named is read, also where it is hidden; of a folder, neither hidden files, folders nor videos.
        yield from (one for one in inside if one == path or not _is_skipped(one))


def _is_skipped(path: Path) -> bool:
    return path.name.startswith(".") or plain_id(path.name) != path.name or os.path.isdir(path)


@dataclass(slots=True)
class _Videos:
    """The files of a folder, measured in a process of their own when they are asked for."""

    folder: Path | None
    problems: list[str] = field(default_factory=list)
    _files: NamedFiles[Path] = field(default_factory=lambda: NamedFiles(()))
    _known: dict[str, tuple[float, float | None] | None] = field(default_factory=dict)
    _isolated: Isolated = field(default_factory=Isolated)

    def __enter__(self) -> _Videos:
        self._files = NamedFiles(videos_in(self.folder)[0] if self.folder else ())
        return self

    def __exit__(self, *error: Any) -> None:
        self._isolated.__exit__(*error)

    def measure(self, video_id: str) -> tuple[float, float | None] | None:
        """As `Found.measure`; a problem is noted where there is no sound file."""
        if video_id not in self._known:
            paths = self._files.of(video_id)
            # Before it is tried, so that a bad file is opened, and told of, once.
            self._known[video_id] = None
            try:
                if len(paths) != 1:
                    what = "no file" if not paths else f"{len(paths)} files ({', '.join(one.name for one in paths)})"
                    raise ValueError(f"{self.folder} has {what} of video {video_id!r}")
                probe = self._isolated.call(SILENT_SECONDS, probe_video, paths[0])
                self._known[video_id] = float(probe.duration_seconds), probe.rate
            except (ValueError, OSError) as error:
                self.problems.append(str(error))
        return self._known[video_id]


def _unify(found: Found, *, fix: bool) -> list[str]:
    """Give labels one spelling, or say that they have several."""
    labels = [label for one in found.videos.values() for _, _, label in one.actions]
    if not fix:
        return twin_problems(labels)
    replaced = one_spelling(labels)
    for one in found.videos.values():
        one.actions = [(start, end, replaced.get(label, label)) for start, end, label in one.actions]
    return fold_notes(replaced)


def _assign(found: Found, options: Conversion) -> list[str]:
    """Put the videos that are in no subset into one."""
    free = {video_id: one for video_id, one in found.videos.items() if one.subset is None}
    for one in free.values():
        one.subset = options.subset or "training"
    # By a hash of the id: the same videos are chosen on every machine, and stay chosen when others are added.
    by_digest = sorted(free, key=lambda video_id: hashlib.sha256(video_id.encode()).digest())
    # One at least on each side, or nothing could be scored, or learnt.
    number = max(1, round(options.validation * len(free))) if options.validation and len(free) > 1 else 0
    for video_id in by_digest[:number]:
        free[video_id].subset = "validation"
    if not free or options.subset or options.validation:
        return []
    return [f'{len(free)} videos are put into "training": nothing tells their subset; see --subset and --validation']


def _later(found: Found) -> list[str]:
    """What the next command will stumble over."""
    notes = [*repeated((video_id, *segment) for video_id, one in found.videos.items() for segment in one.actions)]
    subsets = dict.fromkeys(one.subset for one in found.videos.values() if one.subset is not None)
    notes += alike_subsets(subsets)
    if odd := [name for name in subsets if not SUBSET_NAME.fullmatch(name.lower())]:
        notes.append(
            f"subset {odd[0]!r} cannot be read by the next command: rename it, in letters a to z, digits, _ and -"
        )
    if odd := [video_id for video_id in found.videos if id_fault(video_id)]:
        notes.append(f"{len(odd)} ids cannot be names of videos, such as {odd[0]!r}: {id_fault(odd[0])}")
    missing = [video_id for video_id, one in found.videos.items() if one.duration_seconds is None]
    if missing:
        notes.append(f"{len(missing)} videos have no duration, such as {missing[0]!r}; --videos FOLDER measures them")
    beyond = [
        f"{end:g} s in {video_id}, which lasts {seconds:g} s"
        for video_id, one in found.videos.items()
        if (seconds := one.duration_seconds)
        for _, end, _ in one.actions
        if end > seconds + duration_tolerance(seconds)
    ]
    if beyond:
        notes.append(f"{len(beyond)} actions end after their video, such as {beyond[0]}; if times are frames: --fps")
    return notes


def _lost_in_a_table(found: Found) -> list[str]:
    without = [video_id for video_id, one in found.videos.items() if not one.actions]
    notes = [f"{len(without)} videos without an action are not in a table, such as {without[0]!r}"] if without else []
    if any(one.duration_seconds is not None for one in found.videos.values()):
        notes.append("a table says no durations; a .json does")
    return notes


def _document(found: Found) -> dict[str, Any]:
    return {"version": "1", "taxonomy": [], "database": {key: _entry(one) for key, one in found.videos.items()}}


def _entry(one: FoundVideo) -> dict[str, Any]:
    entry: dict[str, Any] = {"subset": one.subset}
    if one.duration_seconds is not None:
        entry["duration"] = one.duration_seconds
    entry |= one.facts
    if one.is_known:
        entry["annotations"] = [{"segment": [start, end], "label": label} for start, end, label in one.actions]
    return entry


def _table(found: Found) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("video", "start", "end", "label", "subset"))
    for video_id, one in found.videos.items():
        writer.writerows((video_id, start, end, label, one.subset) for start, end, label in one.actions)
    return text.getvalue()


def _summary(found: Found) -> str:
    actions = [label for one in found.videos.values() for _, _, label in one.actions]
    subsets: Mapping[str | None, int] = Counter(one.subset for one in found.videos.values())
    videos = ", ".join(f"{count} {name}" for name, count in sorted(subsets.items(), key=str))
    return f"{len(found.videos)} videos ({videos}), {len(actions)} actions, {len(set(actions))} classes"
