"""`re2tal features pack`: take over features of another program, one .npy file per video."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from re2tal.data.building.annotations import read_annotations, read_frame_rates
from re2tal.data.building.build_features import FeatureBuild
from re2tal.data.building.catalog import find_dataset
from re2tal.data.building.pack_features import (
    Packer,
    Resized,
    Strided,
    count_channels,
    find_features,
    plan_feature_shards,
)
from re2tal.data.contract.feature_manifest import (
    FeatureGrid,
    FeatureSpec,
    FramesPerStep,
    Packed,
    SecondsPerStep,
    StepsPerVideo,
    StoredType,
)
from re2tal.runs.shard_building import report_built, subsets_to_build
from re2tal.strict_json import sha256_of


@dataclass(frozen=True, slots=True)
class Pack:
    """Take over features of another program, one .npy file per video, and their place in time.

    Safe to run again: finished shards are kept. Exit statuses as those of `extract`.
    """

    features: Path
    """Folder of .npy files called ID.npy or v_ID.npy, floats of shape (T, C) or (C, T)."""
    annotations: Path
    """JSON in the layout of ActivityNet or of one of the common THUMOS14 files."""
    out: Path
    """Folder to write to; each subset gets a folder in it."""
    layout: Literal["tc", "ct"] = "tc"
    """Order of the axes: time first, as most files have it, or channels first."""
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
    spec = find_dataset(options.dataset)
    annotations = read_annotations(
        options.annotations,
        classes=spec.classes,
        invalid_segments=options.invalid_segments,
        fix_labels=options.fix_labels,
    )
    for note in annotations.notes:
        print(f"{options.annotations}: {note}")
    timing = _timing(options)
    status = 0
    for subset in options.subsets or subsets_to_build(annotations):
        records = [record for record in annotations.subset(subset) if record.video_id not in spec.blocked]
        if not records:
            raise ValueError(f"every video of subset {subset!r} is blocked; nothing is left to pack")
        subset = records[0].subset  # "val" where the file says "validation", or the other way round
        names = spec.file_names
        files = find_features(options.features, [record.video_id for record in records], file_names=names)
        build = FeatureBuild(
            folder=options.out / subset,
            dataset=options.dataset,
            subset=subset,
            classes=annotations.classes,
            spec=FeatureSpec(
                channels=count_channels(files, layout=options.layout),
                dtype=options.dtype,
                grid=_grid(timing),
                origin=Packed(options.window_frames, options.fps, sha256_of(options.annotations)),
            ),
        )
        shards = plan_feature_shards(records, files, seed=options.seed, videos_per_shard=options.videos_per_shard)
        built = build.run(shards, Packer(files, options.layout, timing).run)
        status = max(status, report_built(built, subset=subset, max_rejected=options.max_rejected))
    return status


def _timing(options: Pack) -> Strided | Resized:
    """How the steps of a file lie in time."""
    strided = (options.stride_frames, options.window_frames, options.fps)
    for name in ("stride_frames", "window_frames", "fps", "resized", "videos_per_shard"):
        if (value := getattr(options, name)) is not None and not 0 < value < float("inf"):
            raise ValueError(f"--{name.replace('_', '-')} is {value}; give a positive number")
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
