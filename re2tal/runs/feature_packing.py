"""`re2tal features pack`: take over features of another program, one file per video."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from re2tal.data.building.annotation_entries import UNKNOWN_SECONDS
from re2tal.data.building.annotations import Annotations, read_annotations, read_frame_rates, read_keys
from re2tal.data.building.blocked import read_blocked
from re2tal.data.building.build_features import FeatureBuild
from re2tal.data.building.catalog import DatasetSpec, find_dataset
from re2tal.data.building.feature_files import FEATURE_SUFFIXES, FeatureFile, list_files
from re2tal.data.building.pack_features import (
    FeatureFiles,
    Layout,
    Packer,
    Resized,
    Strided,
    count_channels,
    find_layout,
    plan_feature_shards,
    sample_shapes,
)
from re2tal.data.building.subset_names import rename_subsets
from re2tal.data.contract.feature_manifest import (
    FeatureGrid,
    FeatureSpec,
    FramesPerStep,
    Packed,
    SecondsPerStep,
    StepsPerVideo,
    StoredType,
)
from re2tal.files import sha256_of
from re2tal.options import COUNT, NOT_NEGATIVE, POSITIVE, SHARE, check_options
from re2tal.runs.shard_building import for_each, subsets_to_build
from re2tal.runs.shard_listing import print_some, report_built
from re2tal.structures import VideoRecord


@dataclass(frozen=True, slots=True)
class Pack:
    """Take over features of another program, one file per video, and their place in time.

    Safe to run again: finished shards are kept. Exit statuses as those of `extract`.
    """

    features: Path
    """Folder of .npy, .npz, .pt, .h5 or .csv files called ID or v_ID, floats of shape (T, C) or (C, T); or one .h5 file
    that holds all under these names."""
    annotations: Path
    """JSON in the layout of ActivityNet or of one of the common THUMOS14 files."""
    out: Path
    """Folder to write to; each subset gets a folder in it."""
    layout: Layout | None = None
    """Order of the axes: tc is time first, ct channels first. By default what the files tell: channels are the same in
    all; where both axes are, the one that fits the durations is time."""
    prefix: str | None = None
    """What files have before the id, such as v_, in place of the catalog's names."""
    suffix: str | None = None
    """What files have after the id, such as _rgb; with the format (_rgb.npy) only such files are taken."""
    key: str | None = None
    """Name of the array in files that hold several (.npz, .pt, .h5)."""
    stride_frames: int | None = None
    """Frames of the video from one step to the next."""
    window_frames: int | None = None
    """Frames that a step was computed from, the first step from frame 0 on; with --stride-frames."""
    fps: float | None = None
    """Frames per second of all videos; by default what the annotation file says of each ("fps", or "frame")."""
    resized: int | None = None
    """Instead of a stride: every file is its whole video as so many steps."""
    dataset: str = "own"
    """Row of the catalog that gives classes and file names, such as thumos14; a name that is not there shows all."""
    subsets: tuple[str, ...] = ()
    """Subsets to pack; all that have annotated actions if none is named."""
    blocked: Path | None = None
    """Ids to leave out, beside those that the catalog names: a JSON list, or a text file with one per line."""
    dtype: StoredType = "float16"
    """How features are stored."""
    invalid_segments: Literal["refuse", "drop"] = "refuse"
    """What to do with segments that are reversed, empty, negative, or longer than the video."""
    fix_labels: bool = False
    """Read labels that differ by case, space or Unicode form as one class, and say so; otherwise they are an error."""
    videos_per_shard: int | None = None
    """By default so that there are 32 shards or more, of 4 to 256 videos."""
    seed: int = 0
    """Of the order of the videos in the shards."""
    max_rejected: float = 0.05
    """Share of a subset's videos that may be unusable without the exit status saying so."""


def pack(options: Pack) -> int:
    """Pack the subsets; gives the exit status."""
    counts = dict.fromkeys(("stride_frames", "window_frames", "resized", "videos_per_shard"), COUNT)
    check_options(options, **counts, fps=POSITIVE, seed=NOT_NEGATIVE, max_rejected=SHARE)
    spec = find_dataset(options.dataset)
    timing = _timing(options)
    files = _files(options, spec)
    annotations = _annotations(options, spec, files, timing)
    subsets = options.subsets or subsets_to_build(annotations)
    blocked, notes = read_blocked(options.blocked, annotations)
    print_some([f"{options.blocked}: {note}" for note in notes], more="notes")
    records = {
        name: [one for one in annotations.subset(name) if one.video_id not in spec.blocked | blocked]
        for name in subsets
    }
    # Told for all subsets before the first is packed.
    if empty := [name for name in subsets if not records[name]]:
        raise ValueError(f"every video of subset {empty[0]!r} is blocked; nothing is left to pack")
    packed = [record for name in subsets for record in records[name]]
    everyone = [one.video_id for some in annotations.subsets.values() for one in some]
    others = [video_id for video_id in everyone if video_id not in spec.blocked | blocked]
    chosen = files.find([record.video_id for record in packed], others)
    # A file that cannot be read is there too: its video is left out with that reason, and not called absent.
    there = chosen.found.keys() | chosen.faults.keys()
    if absent := [name for name in subsets if not any(record.video_id in there for record in records[name])]:
        raise ValueError(f"no video of subset {absent[0]!r} has features in {options.features}; choose with --subsets")
    shapes = sample_shapes(chosen.found, key=options.key)
    layout = options.layout or _layout(shapes, packed, timing)
    channels = count_channels(shapes, layout=layout)
    print(f"{options.features}: files are read as {'(T, C)' if layout == 'tc' else '(C, T)'}, {channels} channels")
    features = FeatureSpec(
        channels=channels,
        dtype=options.dtype,
        grid=_grid(timing),
        origin=Packed(options.window_frames, options.fps, sha256_of(options.annotations)),
    )

    def one(name: str) -> int:
        subset = records[name][0].subset  # "val" where the file says "validation", or the other way round
        build = FeatureBuild(options.out / subset, options.dataset, subset, annotations.classes, features)
        shards = plan_feature_shards(
            records[name], chosen, seed=options.seed, videos_per_shard=options.videos_per_shard
        )
        built = build.run(shards, Packer(chosen, options.key, layout, timing).run)
        return report_built(built, subset=subset, max_rejected=options.max_rejected)

    return for_each(subsets, one)


def _files(options: Pack, spec: DatasetSpec) -> FeatureFiles:
    if options.prefix is None and options.suffix is None:
        return FeatureFiles(options.features, spec.file_names, list_files(options.features))
    after = options.suffix or ""
    form = next((one for one in FEATURE_SUFFIXES if after.lower().endswith(one)), None)
    before, after = ((options.prefix or ""), after[: -len(form)] if form else after)
    # Braces in a prefix or suffix are meant as they are.
    name = "{id}".join(part.replace("{", "{{").replace("}", "}}") for part in (before, after))
    return FeatureFiles(options.features, (name,), list_files(options.features, suffix=form))


def _annotations(options: Pack, spec: DatasetSpec, files: FeatureFiles, timing: Strided | Resized) -> Annotations:
    """The annotations; where they have no duration, the features tell it."""
    annotations = read_annotations(
        options.annotations,
        classes=spec.classes,
        invalid_segments=options.invalid_segments,
        duration_of=_duration_of(options, files, timing),
        fix_labels=options.fix_labels,
    )
    annotations = rename_subsets(annotations, spec.subset_pairs)
    for note in annotations.notes:
        print(f"{options.annotations}: {note}")
    return annotations


def _duration_of(options: Pack, files: FeatureFiles, timing: Strided | Resized) -> Callable[[str], float]:
    """The seconds of a video, from its number of steps."""

    # Once for all videos, and only where an annotation has no duration: it opens files.
    @cache
    def known() -> tuple[Mapping[str, FeatureFile], Layout]:
        found = files.find(list(read_keys(options.annotations))).found
        return found, options.layout or find_layout(sample_shapes(found, key=options.key))

    def duration_of(video_id: str) -> float:
        if isinstance(timing, Resized):
            raise ValueError("features of --resized videos do not tell it")
        found, layout = known()
        try:
            rows, columns = found[video_id].load(key=options.key).shape
            return timing.seconds(video_id, rows if layout == "tc" else columns)
        except (KeyError, ValueError):  # it is left out for that
            return UNKNOWN_SECONDS

    return duration_of


def _layout(shapes: Mapping[str, tuple[int, int]], records: Sequence[VideoRecord], timing: Strided | Resized) -> Layout:
    by_id = {record.video_id: record for record in records}

    def fits(video_id: str, num_steps: int) -> bool:
        try:
            timing.place(by_id[video_id], num_steps)
        except ValueError:
            return False
        return True

    return find_layout(shapes, fits)


def _timing(options: Pack) -> Strided | Resized:
    """How the steps of a file lie in time."""
    strided = (options.stride_frames, options.window_frames, options.fps)
    if options.resized is not None:
        if strided != (None, None, None):
            raise ValueError("--resized excludes --stride-frames, --window-frames and --fps; give one or the other")
        return Resized(options.resized)
    if options.stride_frames is None or options.window_frames is None:
        raise ValueError(
            "where a step lies in time is not known: give --stride-frames and --window-frames (published I3D features "
            "of THUMOS14: 4 and 16), or --resized with the number of steps that every file has"
        )
    fps = options.fps or read_frame_rates(options.annotations)
    return Strided(options.stride_frames, options.window_frames, fps)


def _grid(timing: Strided | Resized) -> FeatureGrid:
    match timing:
        case Resized(num_steps):
            return StepsPerVideo(num_steps)
        case Strided(stride_frames=stride, fps=float(fps)):
            return SecondsPerStep(stride / fps)
        case Strided(stride_frames=stride):
            return FramesPerStep(stride)
