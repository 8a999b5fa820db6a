"""Videos and annotations, or trimmed clips, in; training data out."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Literal

from re2tal.data.building.annotations import Annotations, read_annotations, read_keys
from re2tal.data.building.blocked import read_blocked
from re2tal.data.building.build import BuildConfig, build_shards, find_sources
from re2tal.data.building.catalog import DatasetSpec, find_dataset
from re2tal.data.building.clips import ClipList, read_clips
from re2tal.data.building.isolated import Isolated
from re2tal.data.building.labels import read_class_list
from re2tal.data.building.named_files import NamedFiles, videos_in
from re2tal.data.building.pack_videos import seconds_of
from re2tal.data.building.probe import MAX_DAMAGED
from re2tal.data.building.shard_folder import REPORTS, BuiltSubset, Listed, NothingUsableError
from re2tal.data.building.subset_names import rename_subsets
from re2tal.data.contract.manifest import Encoding, FramesPerSecond, FramesPerVideo, Rejection
from re2tal.machine import num_workers
from re2tal.options import COUNT, NOT_NEGATIVE, SHARE, check_options
from re2tal.progress import Progress
from re2tal.runs.lock import locked, refuse_in_use
from re2tal.runs.shard_listing import print_some, report_built


@dataclass(frozen=True, slots=True)
class Build:
    """Normalise videos and pack them into shards, one folder per subset: with --annotations videos in which actions
    begin and end, with --clips trimmed ones that show a single action.

    Safe to stop and to run again: finished shards are kept. Exit status 3 if more than --max-rejected of a subset's
    videos cannot be used (the shards are complete without them), 2 for wrong input.
    """

    out: Path
    """Folder to write to; each subset gets a folder in it."""
    annotations: Path | None = None
    """JSON in the layout of ActivityNet or of one of the common THUMOS14 files."""
    clips: tuple[Path, ...] = ()
    """In place of annotations: a folder SUBSET/CLASS/ID.mp4, or text files, such as train.csv val.csv: Kinetics' own,
    or with a path and a class in each line."""
    videos: Path | None = None
    """Folder of video files, sub-folders too, called ID.mp4 or v_ID.mp4 (or .mkv, .webm, .avi, ...); of clips in a CSV,
    the folder that holds them, however deep, or that paths start from."""
    classes: Path | None = None
    """With --clips: text file with one class per line. It fixes their order; labels that are numbers count in it."""
    dataset: str = "own"
    """Row of the catalog that gives the defaults, such as thumos14; a name that is not there shows all."""
    subsets: tuple[str, ...] = ()
    """Subsets to build; all that have annotated actions if none is named."""
    fps: float | None = None
    """Store so many frames per second instead of what the catalog says."""
    frames: int | None = None
    """Store every video as so many frames instead."""
    short_side: int | None = None
    """Pixels of the shorter side instead of what the catalog says; smaller videos keep their size."""
    blocked: Path | None = None
    """Ids to leave out, beside those that the catalog names: a JSON list, or a text file with one per line."""
    invalid_segments: Literal["refuse", "drop"] = "refuse"
    """What to do with segments that are reversed, empty, negative, or longer than the video."""
    fix_labels: bool = False
    """Read labels that differ by case, space or Unicode form as one class, and say so; otherwise they are an error."""
    copy: bool = False
    """Keep the pictures of files that can be read by frame number as they are (H.264, HEVC or VP9 in mp4, mov, mkv or
    webm, constant rate, closed groups, upright, undamaged); the others are encoded, and the reason is said."""
    shard_size: str = "2GB"
    """How large a shard may be, such as 500MB, unless a single video is larger."""
    videos_per_shard: int | None = None
    """At most so many videos in a shard, besides."""
    seed: int = 0
    """Of the order of the videos in the shards."""
    workers: int | None = None
    """Processes that encode; by default one per core that this process may use."""
    part: str = "0/1"
    """i/n builds the i-th (from 0) of n parts, for machines that share a disk; the last to end writes the manifest."""
    max_damaged: float = MAX_DAMAGED
    """Share of a video's frames that may be damaged or missing; a video with more is left out."""
    max_rejected: float = 0.05
    """Share of a subset's videos that may be unusable without the exit status saying so."""


def build(options: Build) -> int:
    """Build the subsets; gives the exit status."""
    counts = {"frames": COUNT, "videos_per_shard": COUNT, "workers": COUNT}
    check_options(options, **counts, seed=NOT_NEGATIVE, max_damaged=SHARE, max_rejected=SHARE)
    spec = find_dataset(options.dataset)
    config = _config(options, spec)
    listed = _listed(options, spec)
    blocked, notes = read_blocked(options.blocked, listed)
    print_some([f"{options.blocked}: {note}" for note in notes], more="notes")
    config = replace(config, blocked=config.blocked | blocked)
    subsets = options.subsets or subsets_to_build(listed)
    for subset in subsets:  # before the first one takes hours
        find_sources(listed, options.videos, subset=subset, config=config)

    def one(subset: str) -> int:
        built = _build_with_bar(listed, options.videos, options.out, subset, config)
        if options.copy and built.is_complete:
            num_stored = built.num_videos - len(built.rejected)
            print(f"{subset}: {built.num_copies} videos stored as they came, {num_stored - built.num_copies} encoded")
        return report_built(built, subset=subset, max_rejected=options.max_rejected)

    return for_each(subsets, one)


def for_each(subsets: Sequence[str], one: Callable[[str], int]) -> int:
    """The highest exit status of `one`; a subset of which nothing can be used is an error once the others are done."""
    status, empty = 0, []
    for subset in subsets:
        try:
            status = max(status, one(subset))
        except NothingUsableError as error:
            empty.append(f"{subset}: {error}")
    # At the end: the other subsets are built whole all the same.
    if empty:
        raise ValueError("; ".join(empty))
    return status


def _config(options: Build, spec: DatasetSpec) -> BuildConfig:
    part_index, num_parts = parse_part(options.part)
    return BuildConfig(
        dataset=options.dataset,
        encoding=_encoding(options, spec.encoding),
        file_names=spec.file_names,
        blocked=spec.blocked,
        max_damaged=options.max_damaged,
        copy=options.copy,
        shard_bytes=parse_size(options.shard_size),
        videos_per_shard=options.videos_per_shard,
        seed=options.seed,
        workers=num_workers(options.workers),
        part_index=part_index,
        num_parts=num_parts,
    )


def parse_size(text: str) -> int:
    """--shard-size as bytes."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", text.strip(), re.IGNORECASE)
    num_bytes = 0
    if found:
        unit = 1024 if found[3] else 1000
        num_bytes = round(float(found[1]) * unit ** " KMGT".index(found[2].upper() or " "))
    if num_bytes < 1:
        raise ValueError(f"--shard-size is {text!r}; give a size such as 2GB or 500MB")
    return num_bytes


def parse_part(text: str) -> tuple[int, int]:
    """--part i/n as (i, n)."""
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise ValueError(f"--part is {text!r}; give i/n with i from 0 to n - 1, such as 0/4")
    return int(index), int(count)


def _encoding(options: Build, encoding: Encoding) -> Encoding:
    if options.copy and options.frames is not None:
        raise ValueError(f"--copy keeps all frames of a file, --frames {options.frames} does not; leave one out")
    if options.fps is not None and options.frames is not None:
        raise ValueError(f"--fps {options.fps} and --frames {options.frames} exclude each other; give one of them")
    if options.fps is not None:
        if not 0 < options.fps <= 240:
            raise ValueError(f"--fps is {options.fps}; give a rate above 0, at most 240")
        encoding = replace(encoding, sampling=FramesPerSecond(options.fps))
    if options.frames is not None:
        encoding = replace(encoding, sampling=FramesPerVideo(options.frames))
    if options.short_side is not None:
        if not 16 <= options.short_side <= 2160 or options.short_side % 2:
            raise ValueError(f"--short-side is {options.short_side}; give an even number from 16 to 2160")
        encoding = replace(encoding, short_side=options.short_side)
    return encoding


def _listed(options: Build, spec: DatasetSpec) -> Annotations | ClipList:
    """What is to be packed."""
    if bool(options.clips) == bool(options.annotations):
        raise ValueError("give either --annotations FILE with --videos FOLDER, or --clips FOLDER_OR_FILES")
    if options.clips:
        classes = read_class_list(options.classes) if options.classes else spec.classes
        clips = read_clips(options.clips, videos=options.videos, classes=classes, fix_labels=options.fix_labels)
        print_some(clips.notes, more="labels")
        print_some([f"left out {line}" for line in clips.left_out], more="files")
        return clips
    assert options.annotations is not None
    if options.videos is None:
        raise ValueError(f"--annotations {options.annotations} needs --videos; give the folder that holds the videos")
    if options.classes is not None:
        raise ValueError(f"--classes {options.classes} is for --clips; the annotation file names its classes itself")
    return _annotations(options.annotations, options.videos, options, spec)


def _annotations(path: Path, videos: Path, options: Build, spec: DatasetSpec) -> Annotations:
    files, odd = videos_in(videos)
    print_some(odd, more="files")
    with Isolated() as isolated:
        annotations = read_annotations(
            path,
            classes=spec.classes,
            invalid_segments=options.invalid_segments,
            duration_of=_measure(path, NamedFiles(files), spec.file_names, isolated),
            fix_labels=options.fix_labels,
        )
    annotations = rename_subsets(annotations, spec.subset_pairs)
    for note in annotations.notes:
        print(f"{path}: {note}")
    return annotations


def _measure(
    annotations: Path, files: NamedFiles[Path], file_names: Sequence[str], isolated: Isolated
) -> Callable[[str], float]:
    """Gives the seconds of a video."""
    found: dict[str, Path] = {}

    def measured(video_id: str) -> float:
        if not found:
            keys = read_keys(annotations)
            found.update(files.choose(list(keys), file_names, keys=keys).found)
        return seconds_of(found.get(video_id), isolated)

    return measured


@contextmanager
def shards_locked(folder: Path, *, part_index: int = 0, num_parts: int = 1) -> Iterator[None]:
    """Inside, shards of `folder` are this process's to write, or those of its part. ValueError, naming the owner, where
    another living process has them."""
    parts = folder / REPORTS
    # Parts are made to work at once, each once. Two others would remove each other's unfinished videos.
    mine = folder if num_parts == 1 else parts / f"part-{part_index}-of-{num_parts}"
    with locked(mine):
        # With one's own lock in hand: of two that begin at once, one at least sees the other's.
        others = {folder, *parts.glob("part-*-of-*")} - {mine}
        if num_parts > 1:
            others -= {*parts.glob(f"part-*-of-{num_parts}")}
        refuse_in_use(*sorted(others))
        yield


def subsets_to_build(listed: Annotations | ClipList) -> list[str]:
    """All, but of an annotation file only those that have annotated actions."""
    if isinstance(listed, ClipList):
        return list(listed.subsets)
    return [name for name, records in listed.subsets.items() if any(record.actions for record in records)]


def _build_with_bar(
    listed: Annotations | ClipList, videos: Path | None, out: Path, subset: str, config: BuildConfig
) -> BuiltSubset:
    progress = Progress(1)
    done = count(1)

    def on_start(num_videos: int) -> None:
        progress.total = num_videos

    def on_video(one: Listed, rejection: Rejection | None) -> None:
        progress.to(next(done), f"{subset}, {one.video_id}")

    folder = out / listed.subset(subset)[0].subset
    try:
        with shards_locked(folder, part_index=config.part_index, num_parts=config.num_parts):
            return build_shards(
                listed, videos=videos, out=out, subset=subset, config=config, on_start=on_start, on_video=on_video
            )
    finally:
        progress.close()
