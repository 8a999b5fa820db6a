"""`re2tal detect`: find actions with a trained detector, in a folder of video files or in shards.

    videos -> shards in a temporary folder, normalised as the detector's clips ask -> windows -> results JSON

The detour is not wasted: arbitrary files decode exactly only after they have been normalised.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
from tqdm import tqdm

from re2tal.backbones.stored import NAME
from re2tal.cli.feature_run import check_features, check_kind
from re2tal.config import RecognitionConfig, RunConfig, build_detector, load_config
from re2tal.data.building.annotations import Annotations
from re2tal.data.building.build import BuildConfig, build_shards
from re2tal.data.building.isolated import Isolated
from re2tal.data.building.probe import VIDEO_SUFFIXES, probe_video
from re2tal.data.contract.manifest import Encoding, FramesPerSecond, FramesPerVideo, Rejection
from re2tal.data.contract.shards import FeatureSet, ShardSet, open_any, open_shards
from re2tal.data.streaming.stream import ClipConfig, stream_clips
from re2tal.data.streaming.windows import ResizeWhole, Slide, Trimmed
from re2tal.detector import TemporalActionDetector
from re2tal.evaluation.results import write_results
from re2tal.evaluation.video_classes import VideoClasses, read_video_classes
from re2tal.inference import predict
from re2tal.structures import Detections, VideoRecord
from re2tal.training.engine import DTYPES
from re2tal.training.export import read_model

AnyRun = TypeVar("AnyRun", RunConfig, RecognitionConfig)

SUBSET = "detect"
PROBE_SECONDS = 120.0
"""a file whose packets cannot be counted in this time is left out"""


def detect(
    *,
    run: Path,
    videos: Path | None = None,
    shards: Path | None = None,
    out: Path | None = None,
    video_classes: Path | None = None,
    top_k: int = 2,
    batch_size: int | None = None,
    device: str | None = None,
) -> int:
    """Write what a trained detector finds to a results JSON. Exit status 1 if some videos could not be used.

    Args:
        run: folder of a training run: config.json and model.safetensors
        videos: folder of video files to look at, of any format and size; results carry their names without the suffix
        shards: folder of one subset's shards, or features, to look at instead; by default the run's validation shards
        out: results JSON to write; by default RUN/results.json, or RUN/detections.json for other videos than the run's
        video_classes: JSON of a classifier of whole videos, {"results": {ID: [K scores]}, "class": [K names]}, that
            names what a class-agnostic detector finds; without it the results' only class is "action"
        top_k: with --video-classes, each detection is written once for each of its video's so many best classes
        batch_size: clips in one forward; by default as in training
        device: "cpu", "cuda", "cuda:1", ...; by default an accelerator if there is one
    """
    if videos is not None and shards is not None:
        raise ValueError(f"--videos {videos} and --shards {shards} were both given; give one of them")
    config = load_config(run / "config.json")
    if videos is not None and config.backbone.name == NAME:
        raise ValueError(
            f"--videos {videos} was given, but {run} has no network that looks at videos: it was trained on stored "
            "features; pack these videos (re2tal shards build), extract their features as those of its training were "
            "(re2tal features extract) and give --shards"
        )
    namer = _read_namer(video_classes, config, top_k=top_k)
    target = out or run / ("results.json" if videos is None and shards is None else "detections.json")
    chosen = torch.device(device) if device else default_device()
    detector = load_detector(run, config).to(chosen, DTYPES[config.engine.precision])
    batch_size = batch_size or config.engine.batch_size
    if videos is None:
        data = open_any(shards or config.data.shards / config.data.validation_subset)
        check_kind(config, data)
        if isinstance(data, FeatureSet):
            check_features(data, read_model(run / "model.safetensors").features, run=run)
        if namer is not None:
            namer.check(data.by_id, top_k=top_k)
        found = detect_in_shards(detector, data, config, batch_size=batch_size, device=chosen)
        rejected: list[Rejection] = []
    else:
        with tempfile.TemporaryDirectory(prefix="re2tal-detect-") as scratch:
            data, names, rejected = pack_videos(
                videos, Path(scratch), config.data.clips, classes=detector.localizer.classes
            )
            if namer is not None:
                namer.check((names[video_id] for video_id in data.by_id), top_k=top_k)
            found = detect_in_shards(detector, data, config, batch_size=batch_size, device=chosen)
        found = {names[video_id]: detections for video_id, detections in found.items()}
    classes = detector.localizer.classes
    if namer is not None:
        found, classes = namer.name(found, top_k=top_k), namer.classes
    write_results(target, found, classes)
    for rejection in rejected:
        print(f"left out: {rejection.video_id}: {rejection.reason}", file=sys.stderr)
    print(f"{sum(map(len, found.values()))} detections in {len(found)} videos; {target}")
    return 1 if rejected else 0


def _read_namer(path: Path | None, config: RunConfig, *, top_k: int) -> VideoClasses | None:
    if path is None:
        return None
    if not config.localizer.class_agnostic:
        raise ValueError(
            f"--video-classes {path} was given, but this run's localizer.class_agnostic is false: its detections have "
            "classes of their own; leave the option out, or give the run folder of a class-agnostic detector"
        )
    namer = read_video_classes(path)
    namer.check((), top_k=top_k)
    return namer


def load_detector(run: Path, config: RunConfig) -> TemporalActionDetector:
    """The detector of a run folder with its trained weights, on the CPU."""
    model = read_model(run / "model.safetensors")
    detector = build_detector(started(config), model.classes)
    model.load_into(detector, classes=detector.localizer.classes)
    return detector


def started(config: AnyRun) -> AnyRun:
    """What builds a run's network for weights that it trained: without the file that its backbone started from.

    That held weights only, and may not be on this machine. A folder or a hub name also says how large the network is.
    """
    weights = config.backbone.weights
    if weights is not None:
        from re2tal.backbones.hub.pretrained import weights_file  # imports transformers, which takes seconds

        weights = None if weights_file(weights) else weights
    return replace(config, backbone=replace(config.backbone, weights=weights))


def detect_in_shards(
    detector: TemporalActionDetector,
    shards: ShardSet | FeatureSet,
    config: RunConfig,
    *,
    batch_size: int,
    device: torch.device,
) -> dict[str, Detections]:
    """Detections of every video in `shards`, with a progress bar on a terminal."""
    clips = stream_clips(shards, config.data.clips, batch_size=batch_size, training=False)
    batches = tqdm(clips.epoch(0), total=clips.steps_per_epoch, unit="batch", disable=not sys.stderr.isatty())
    return predict(detector, batches, suppression=config.suppression, device=device)


def pack_videos(
    folder: Path, scratch: Path, clips: ClipConfig, *, classes: Iterable[str]
) -> tuple[ShardSet, dict[str, str], list[Rejection]]:
    """Shards of all videos in `folder`, the name of each id, and the files that cannot be used.

    File names may hold anything, ids may not: the files are linked under numbers. Raises ValueError if there is no
    video, or none that can be used.
    """
    files = list_videos(folder)
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
        raise ValueError(f"none of the {len(files)} videos in {folder} can be used; {rejected[0].reason}")
    built = build_shards(
        Annotations({SUBSET: tuple(records)}, tuple(classes), num_ambiguous=0, num_clipped=0, num_dropped=0),
        videos=links,
        out=scratch / "shards",
        subset=SUBSET,
        config=BuildConfig(dataset=SUBSET, encoding=encoding_for(clips), workers=len(os.sched_getaffinity(0))),
    )
    rejected += [Rejection(names[one.video_id], one.reason) for one in built.rejected]
    return open_shards(built.folder), names, rejected


def list_videos(folder: Path) -> list[Path]:
    """The video files of a folder, by name; ValueError if there are none."""
    if not folder.is_dir():
        raise ValueError(f"--videos {folder} is not a folder; give one that holds video files")
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in VIDEO_SUFFIXES)
    if not files:
        raise ValueError(f"{folder} holds no video file; wanted one of {', '.join(VIDEO_SUFFIXES)}")
    return files


def encoding_for(clips: ClipConfig) -> Encoding:
    """How to store a video of which only `clips` will be cut, whole pictures at the clips' own size and rate."""
    short_side = max(16, clips.size + clips.size % 2)
    match clips.windowing:
        case ResizeWhole(num_frames=num_frames):
            return Encoding(FramesPerVideo(num_frames), short_side=short_side)
        case Slide(frames_per_second=rate) | Trimmed(frames_per_second=rate):
            if rate is None:
                raise ValueError(
                    "data.clips.windowing.frames_per_second of this run is null, the rate of its shards, so at which "
                    "rate to take other videos is not known; build shards of them and give --shards"
                )
            return Encoding(FramesPerSecond(rate), short_side=short_side)


def default_device() -> torch.device:
    """The accelerator, if there is one."""
    return (torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None) or torch.device(
        "cpu"
    )
