"""Trimmed clips and their classes, listed by a folder or by text files: what recognition trains on.

    ROOT/SUBSET/CLASS/ID.mp4                        a folder
    label,youtube_id,time_start,time_end,split      Kinetics' CSV; files are called ID_000012_000022.mp4
    path label    or    path,label                  a line of the lists of mmaction2, pytorchvideo and SlowFast; either
                                                    may stand in double quotes

Every clip becomes a video with one action that lasts from its first frame to its last. How long that is, is measured
when the clip is packed. Subsets called train or val become "training" and "validation", which recipes look for.
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from re2tal.data.building.annotation_entries import SUBSET_NAME, raise_together
from re2tal.data.building.annotation_formats.found import subset_in_name
from re2tal.data.building.labels import Classes, fold_notes, one_spelling, twin_problems
from re2tal.data.building.named_files import videos_in
from re2tal.data.contract.shards import FeatureSet, ShardSet
from re2tal.structures import SUBSETS, Action, VideoRecord
from re2tal.video_ids import VIDEO_SUFFIXES, composed, id_fault

KINETICS_COLUMNS = ("label", "youtube_id", "time_start", "time_end")
_APART = r"(?:\s*,\s*|\s+)"
_QUOTED = re.compile(rf'"((?:[^"]|"")+)"{_APART}(.+)')
_ENDS = re.compile(rf"(?<=.)({'|'.join(map(re.escape, VIDEO_SUFFIXES))}){_APART}", re.IGNORECASE)
"""Where the path in a line may end."""
_NUMBERS = re.compile(r"-?\d+(?:[\s,]+-?\d+)+")
"""Not in quotes: several classes of one video, as lists of mmaction2 for multi-label data have them."""


@dataclass(frozen=True, slots=True)
class TrimmedClip:
    """A video of unknown length that shows one action from end to end."""

    video_id: str
    subset: str
    label: str

    def lasting(self, seconds: float) -> VideoRecord:
        """The record of the clip, now that its length is known."""
        return VideoRecord(self.video_id, self.subset, seconds, (Action(0.0, seconds, self.label),))


@dataclass(frozen=True, slots=True)
class ClipList:
    """What a folder or text files say."""

    subsets: Mapping[str, tuple[TrimmedClip, ...]]
    """Subset name -> its clips in the order they were found."""
    classes: tuple[str, ...]
    """Class names; sorted, unless the caller gave them."""
    paths: Mapping[str, Path]
    """Video id -> where its file is, or should be."""
    faults: Mapping[str, str] = field(default_factory=dict)
    """Video id -> why none of its files is taken, though there are several."""
    left_out: tuple[str, ...] = ()
    """Files of a folder that are no clips, with the reason: a folder may hold anything."""
    notes: tuple[str, ...] = ()
    """Labels that were read as another: a sentence each, for people."""

    def subset(self, name: str) -> tuple[TrimmedClip, ...]:
        """The clips of a subset, whatever the case of its name; ValueError where there are none."""
        wanted = SUBSETS.get(name.lower(), name.lower())
        try:
            return self.subsets[wanted]
        except KeyError:
            raise ValueError(f"no clip belongs to subset {name!r}; there are {sorted(self.subsets)}") from None


class _Entry(NamedTuple):
    """One clip as it was found; `where` tells a person."""

    where: str
    subset: str
    label: str
    path: Path
    fault: str = ""
    """Why its file is not taken."""


def read_clips(
    places: Sequence[Path],
    *,
    videos: Path | None = None,
    classes: Sequence[str] | None = None,
    fix_labels: bool = False,
) -> ClipList:
    """Read one folder of clips, or text files of any of the layouts, most often one per subset.

    `videos` is the folder that holds the files of a CSV, however deep, or that paths in lists start from (by default
    the list's own). `classes` fixes the class list; labels that are numbers count in it, from 0. Labels that differ by
    case, space or Unicode form are refused, or with `fix_labels` read as one. All that is wrong is reported together:
    raises ValueError naming the file and line, the value and the remedy.
    """
    if len(places) != 1 and any(place.is_dir() for place in places):
        raise ValueError(f"--clips names {len(places)} places and a folder among them; give one folder, or text files")
    problems: list[str] = []
    left_out: list[str] = []
    entries = [entry for place in places for entry in _entries(place, videos, problems, left_out)]
    replaced = one_spelling((entry.label for entry in entries), classes=classes or ()) if fix_labels else {}
    entries = [entry._replace(label=replaced.get(entry.label, entry.label)) for entry in entries]
    names = Classes((entry.label for entry in entries), classes)
    clips: list[TrimmedClip] = []
    paths: dict[str, Path] = {}
    faults = {entry.path.stem: entry.fault for entry in entries if entry.fault}
    for entry in entries:
        video_id = entry.path.stem
        try:
            clip = TrimmedClip(_checked_id(video_id, entry.path), _subset(entry.subset), names.name(entry.label))
        except ValueError as problem:
            problems.append(f"{entry.where}: {problem}")
            continue
        # Of clips in a folder the twins are left out (`faults`); a list that names one twice is wrong.
        if video_id in paths:
            if video_id not in faults:
                what = f"{entry.path} has the id of {paths[video_id]}: rename one, or list it once"
                problems.append(f"{entry.where}: {what}")
            continue
        paths[video_id] = entry.path
        clips.append(clip)
    problems += twin_problems(clip.label for clip in clips)
    title = ", ".join(map(str, places))
    raise_together(title, problems, hint=names.hint)
    if not clips:
        raise_together(title, left_out)
        raise ValueError(f"{title}: there is no clip in it; wanted SUBSET/CLASS/ID.mp4, or a line for each clip")
    subsets: dict[str, list[TrimmedClip]] = {}
    for clip in clips:
        subsets.setdefault(clip.subset, []).append(clip)
    return ClipList(
        subsets={name: tuple(found) for name, found in subsets.items()},
        classes=tuple(sorted({clip.label for clip in clips})) if classes is None else tuple(classes),
        paths=paths,
        faults=faults,
        left_out=(*left_out, *faults.values()),
        notes=tuple(fold_notes(replaced)),
    )


def true_classes(shards: ShardSet | FeatureSet) -> dict[str, str]:
    """Video id -> what the clip shows; ValueError where videos do not show one action each."""
    shown = {video.record.video_id: [action.label for action in video.record.actions] for video in shards.videos}
    if odd := {video_id: labels for video_id, labels in shown.items() if len(labels) != 1}:
        video_id, labels = next(iter(odd.items()))
        raise ValueError(
            f"{shards.root}: video {video_id!r}, like {len(odd)} in all, shows {len(labels)} actions; recognition "
            "takes trimmed clips that show one: build shards with --clips"
        )
    return {video_id: label for video_id, (label,) in shown.items()}


def _entries(place: Path, videos: Path | None, problems: list[str], left_out: list[str]) -> list[_Entry]:
    if place.is_dir():
        if videos is not None:
            raise ValueError(f"--clips {place} is a folder that holds the clips itself; leave --videos {videos} out")
        return _without_twins(_in_folder(place, left_out))
    try:
        lines = place.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"--clips {place} is not a text file in UTF-8: {error}") from None
    header = [column.strip() for column in next(csv.reader(lines[:1]), [])]
    if "youtube_id" in header:
        return list(_in_kinetics(place, lines, header, videos, problems, left_out))
    return list(_in_list(place, lines, videos or place.parent, problems))


def _in_folder(root: Path, left_out: list[str]) -> Iterator[_Entry]:
    paths, odd = videos_in(root)
    left_out += odd
    for path in paths:
        parts = path.relative_to(root).parts
        if len(parts) != 3:
            left_out.append(f"{path}: it lies {len(parts)} levels down; wanted {root}/SUBSET/CLASS/{path.name}")
        elif fault := id_fault(path.stem):
            left_out.append(f"{path}: {fault}")
        else:
            yield _Entry(str(path), parts[0], parts[1], path)


def _without_twins(found: Iterable[_Entry]) -> list[_Entry]:
    """The same clips; those whose files have one id are marked."""
    entries = list(found)
    by_id: dict[str, list[Path]] = {}
    for entry in entries:
        by_id.setdefault(composed(entry.path.stem), []).append(entry.path)
    return [entry._replace(fault=_twins(by_id[composed(entry.path.stem)])) for entry in entries]


def _twins(paths: Sequence[Path]) -> str:
    return f"{' and '.join(map(str, paths))} have one id: rename them, or keep one" if len(paths) > 1 else ""


def _in_kinetics(
    place: Path,
    lines: Sequence[str],
    header: Sequence[str],
    videos: Path | None,
    problems: list[str],
    left_out: list[str],
) -> Iterator[_Entry]:
    if missing := [column for column in KINETICS_COLUMNS if column not in header]:
        raise ValueError(f"{place} has no column {missing[0]!r}; wanted {','.join(KINETICS_COLUMNS)} and perhaps split")
    if videos is None or not videos.is_dir():
        raise ValueError(f"{place} names no files, and --videos is {videos}; give the folder that holds the clips")
    files: dict[str, list[Path]] = {}
    paths, odd = videos_in(videos)
    left_out += odd
    for path in paths:
        files.setdefault(path.stem, []).append(path)
    subset = None if "split" in header else _named_subset(place)
    rows = csv.DictReader(lines[1:], fieldnames=header)
    for row in rows:
        where = f"{place} line {rows.line_num + 1}"
        start, end = (row["time_start"] or "").strip(), (row["time_end"] or "").strip()
        if not (_is_whole(start) and _is_whole(end)):
            problems.append(f"{where}: time_start and time_end are {start!r} and {end!r}: give whole seconds")
            continue
        stem = f"{(row['youtube_id'] or '').strip()}_{int(float(start)):06d}_{int(float(end)):06d}"
        if fault := id_fault(stem):
            problems.append(f"{where}: youtube_id is {row['youtube_id']!r:.100}: {fault}")
            continue
        found = files.get(stem, [])
        path = found[0] if found else videos / f"{stem}.mp4"
        label = (row["label"] or "").strip()
        yield _Entry(where, subset or (row["split"] or "").strip(), label, path, _twins(found))


def _in_list(place: Path, lines: Sequence[str], videos: Path, problems: list[str]) -> Iterator[_Entry]:
    subset = _named_subset(place)
    for number, line in enumerate(lines, start=1):
        where, text = f"{place} line {number}", line.strip()
        found = _split(text)
        if len(found) > 1:  # a file's name, or the class, holds another
            found = [one for one in found if os.path.isfile(videos / one[0])]
            if len(found) != 1:
                what = f"{len(found) or 'none'} of the files that it may name are there"
                problems.append(f'{where} is {line[:120]!r}: {what}; write "PATH",CLASS with the path in double quotes')
                continue
        if found:
            ((path, label),) = found
            if _NUMBERS.fullmatch(label) and not text.endswith('"'):
                what = "several classes, and a trimmed clip shows one: list it with one, or leave it out"
                problems.append(f"{where}: its class is {label[:120]!r}: {what}")
                continue
            yield _Entry(where, subset, label, videos / path)
        elif text and not (number == 1 and line.split(",")[0].strip() == "path"):
            problems.append(f"{where} is {line[:120]!r}: give the path of a video file, then its class")


def _split(line: str) -> list[tuple[str, str]]:
    """The ways to read a line as (path, class), most often one."""
    if quoted := _QUOTED.fullmatch(line):
        path = quoted[1].replace('""', '"')
        return [(path, _unquoted(quoted[2]))] if path.lower().endswith(VIDEO_SUFFIXES) else []
    return [(line[: end.end(1)], _unquoted(line[end.end() :])) for end in _ENDS.finditer(line) if line[end.end() :]]


def _unquoted(text: str) -> str:
    return text[1:-1].replace('""', '"').strip() if re.fullmatch(r'"(?:[^"]|"")+"', text) else text


def _is_whole(text: str) -> bool:
    return re.fullmatch(r"\d{1,6}(\.0*)?", text) is not None


def _named_subset(place: Path) -> str:
    if (subset := subset_in_name(place)) is None:
        raise ValueError(f"{place}: its name does not tell the subset; call it train.csv or val.csv, say")
    return subset


def _subset(name: str) -> str:
    subset = SUBSETS.get(name.lower(), name.lower())
    if not SUBSET_NAME.fullmatch(subset):
        raise ValueError(f"the subset is {name[:100]!r}: give a name such as train or val")
    return subset


def _checked_id(video_id: str, path: Path) -> str:
    if fault := id_fault(video_id):
        raise ValueError(f"{path.name!r} gives no id: {fault}")
    return video_id
