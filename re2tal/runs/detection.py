"""Detect actions with a trained detector, in a folder of video files or in shards.

    videos -> shards in a temporary folder, normalised as the detector's clips ask -> windows -> results JSON

The detour is not wasted: arbitrary files decode exactly only after they have been normalised.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from re2tal.backbones.stored import NAME
from re2tal.config import DataConfig, RecognitionConfig, RunConfig, load_config
from re2tal.data.building.annotations import Annotations
from re2tal.data.building.build import BuildConfig, build_shards
from re2tal.data.building.isolated import Isolated
from re2tal.data.building.probe import VIDEO_SUFFIXES, probe_video
from re2tal.data.contract.manifest import Encoding, FramesPerSecond, FramesPerVideo, Rejection
from re2tal.data.contract.shards import FeatureSet, ShardSet, open_any, open_shards, subset_folder
from re2tal.data.streaming.stream import ClipConfig, stream_clips
from re2tal.data.streaming.windows import ResizeWhole, Slide, Trimmed
from re2tal.detector import TemporalActionDetector
from re2tal.evaluation.results import write_results
from re2tal.evaluation.video_classes import VideoClasses, read_video_classes
from re2tal.inference import predict
from re2tal.runs.folder import CONFIG_NAME, MODEL_NAME, RESULTS_NAME
from re2tal.runs.stored_features import check_features, check_kind
from re2tal.runs.trained import default_device, load_detector
from re2tal.structures import Batch, Detections, VideoRecord
from re2tal.training.engine import DTYPES
from re2tal.training.export import read_model

logger = logging.getLogger(__name__)

SUBSET = "detect"
PROBE_SECONDS = 120.0
"""a file whose packets cannot be counted in this time is left out"""


@dataclass(frozen=True, slots=True)
class Detected:
    """Detections of a trained detector, as they were written."""

    path: Path
    """The results JSON that was written."""
    found: Mapping[str, Detections]
    """By video."""
    rejected: Sequence[Rejection]
    """Video files that could not be used."""
    max_per_video: int
    """The limit of suppression."""
    videos_at_max: Sequence[str]
    """Videos with so many detections: any more were cut."""


def detect(
    run: Path,
    *,
    videos: Path | None = None,
    shards: Path | None = None,
    out: Path | None = None,
    video_classes: Path | None = None,
    top_k: int = 2,
    batch_size: int | None = None,
    device: str | None = None,
) -> Detected:
    """Detect actions in a folder of videos, or in shards, with the detector of a run folder; write a results JSON.

    The arguments are those of `re2tal detect`.
    """
    config = load_config(run / CONFIG_NAME)
    data = open_source(config, videos=videos, shards=shards)
    if videos is not None:
        check_looks_at_videos(run, config, asked=f"a folder of videos, {videos},")
    namer = _read_namer(video_classes, config, top_k=top_k)
    target = out or run / (RESULTS_NAME if videos is None and shards is None else "detections.json")
    chosen = torch.device(device) if device else default_device()
    detector = load_detector(run, config).to(chosen, DTYPES[config.engine.precision])
    look = partial(
        detect_in_shards, detector, config=config, batch_size=batch_size or config.engine.batch_size, device=chosen
    )
    rejected: list[Rejection] = []
    if data is not None:
        if isinstance(data, FeatureSet):
            check_features(data, read_model(run / MODEL_NAME).features, run=run)
        if namer is not None:
            namer.check(data.by_id, top_k=top_k)
        found = look(data)
    else:
        assert videos is not None
        files = list_videos(videos)
        with tempfile.TemporaryDirectory(prefix="re2tal-detect-") as scratch:
            data, names, rejected = pack_videos(
                files, Path(scratch), config.data.clips, classes=detector.localizer.classes
            )
            if namer is not None:
                namer.check((names[video_id] for video_id in data.by_id), top_k=top_k)
            found = look(data)
        found = {names[video_id]: detections for video_id, detections in found.items()}
    classes, limit = detector.localizer.classes, config.suppression.max_per_video
    at_max = [video_id for video_id, detections in found.items() if len(detections) >= limit]
    if namer is not None:
        found, classes = namer.name(found, top_k=top_k), namer.classes
    write_results(target, found, classes)
    return Detected(target, found, rejected, limit, at_max)


def check_looks_at_videos(run: Path, config: RunConfig, *, asked: str) -> None:
    """ValueError where the detector of `run` takes stored features, and `asked` names videos."""
    if config.backbone.name == NAME:
        raise ValueError(
            f"{asked} was asked for, but {run} was trained on stored features and has no network that looks at videos; "
            "pack these videos (re2tal shards build), extract their features as those of its training were (re2tal "
            "features extract), and detect in that folder (shards)"
        )


def _read_namer(path: Path | None, config: RunConfig, *, top_k: int) -> VideoClasses | None:
    if path is None:
        return None
    if not config.localizer.class_agnostic:
        raise ValueError(
            f"video classes, {path}, were given, but this run's localizer.class_agnostic is false: its detections have "
            "classes of their own; leave the file out, or give the run folder of a class-agnostic detector"
        )
    namer = read_video_classes(path)
    namer.check((), top_k=top_k)
    return namer


def detect_in_shards(
    detector: TemporalActionDetector,
    shards: ShardSet | FeatureSet,
    config: RunConfig,
    *,
    batch_size: int,
    device: torch.device,
) -> dict[str, Detections]:
    """Detections of every video in `shards`."""
    batches = batches_with_bar(shards, config.data, batch_size=batch_size)
    return predict(detector, batches, suppression=config.suppression, device=device)


def batches_with_bar(shards: ShardSet | FeatureSet, data: DataConfig, *, batch_size: int) -> Iterable[Batch]:
    """All clips of `shards`, once, with a progress bar on a terminal."""
    stream = stream_clips(shards, data.clips, batch_size=batch_size, training=False, decoder=data.decoder)
    return tqdm(stream.epoch(0), total=stream.steps_per_epoch, unit="batch", disable=not sys.stderr.isatty())


def open_source(
    config: RunConfig | RecognitionConfig, *, videos: Path | None, shards: Path | None
) -> ShardSet | FeatureSet | None:
    """The shards to look at, the validation subset by default; None where a folder of video files was given instead.

    ValueError where both were given, or where the network cannot take what the shards hold.
    """
    if videos is not None and shards is not None:
        raise ValueError(f"videos {videos} and shards {shards} were both given; give one of them")
    if videos is not None:
        return None
    opened = open_any(shards or subset_folder(config.data.shards, config.data.validation_subset))
    check_kind(config, opened)
    return opened


def pack_videos(
    files: Sequence[Path], scratch: Path, clips: ClipConfig, *, classes: Iterable[str]
) -> tuple[ShardSet, dict[str, str], list[Rejection]]:
    """Shards of video files, the name of each id, and the files that cannot be used.

    File names may hold anything, ids may not: the files are linked under numbers. Raises ValueError if none of the
    files can be used.
    """
    stems = [path.stem for path in files]
    links = scratch / "videos"
    links.mkdir()
    names, records, rejected = {}, [], []
    with Isolated() as isolated:
        for number, path in enumerate(files):
            try:
                seconds = float(isolated.call(PROBE_SECONDS, probe_video, path).duration_seconds)
            except ValueError as error:
                rejected.append(Rejection(path.name, str(error)))
                continue
            video_id = f"video-{number:06d}"
            # Two files may differ in their suffix only.
            names[video_id] = path.stem if stems.count(path.stem) == 1 else path.name
            (links / f"{video_id}{path.suffix.lower()}").symlink_to(path.resolve())
            records.append(VideoRecord(video_id, SUBSET, seconds, ()))
    if not records:
        raise ValueError(f"none of the {len(files)} videos in {files[0].parent} can be used; {rejected[0].reason}")
    built = build_shards(
        Annotations({SUBSET: tuple(records)}, tuple(classes), num_ambiguous=0, num_clipped=0, num_dropped=0),
        videos=links,
        out=scratch / "shards",
        subset=SUBSET,
        config=BuildConfig(dataset=SUBSET, encoding=encoding_for(clips), workers=len(os.sched_getaffinity(0))),
    )
    rejected += [Rejection(names[one.video_id], one.reason) for one in built.rejected]
    for one in built.damaged:
        logger.warning("%s: %s", names[one.video_id], one.damage)
    return open_shards(built.folder), names, rejected


def list_videos(folder: Path) -> list[Path]:
    """The video files of a folder, by name; ValueError if there are none."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; give one that holds video files")
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in VIDEO_SUFFIXES)
    if not files:
        raise ValueError(f"{folder} holds no video file; wanted one of {', '.join(VIDEO_SUFFIXES)}")
    return files


def encoding_for(clips: ClipConfig) -> Encoding:
    """The encoding for videos that only serve these clips: their size and rate, whole pictures."""
    short_side = max(16, clips.size + clips.size % 2)
    match clips.windowing:
        case ResizeWhole(num_frames=num_frames):
            return Encoding(FramesPerVideo(num_frames), short_side=short_side)
        case Slide(frames_per_second=rate) | Trimmed(frames_per_second=rate):
            if rate is None:
                raise ValueError(
                    "data.clips.windowing.frames_per_second of this run is null, the rate of its shards, so at which "
                    "rate to take other videos is not known; build shards of them and detect in those"
                )
            return Encoding(FramesPerSecond(rate), short_side=short_side)
