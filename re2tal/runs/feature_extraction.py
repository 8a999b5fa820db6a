"""Run a backbone over whole videos and store its features.

`run` takes the backbone of a trained detector, with the windows and pictures it was trained on; `backbone` names any
other backbone and weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Literal

from re2tal.backbones import BackboneConfig, VideoBackbone, build_backbone, check_wiring
from re2tal.backbones.stored import NAME
from re2tal.config import RunConfig, load_config
from re2tal.data.building.build_features import Computed, FeatureBuild, FeatureShard
from re2tal.data.building.shard_folder import BuiltSubset
from re2tal.data.contract.feature_manifest import (
    Extracted,
    FeatureGrid,
    FeatureSpec,
    SecondsPerStep,
    StepsPerVideo,
    StoredType,
)
from re2tal.data.contract.manifest import FramesPerSecond, FramesPerVideo
from re2tal.data.contract.shards import ShardSet, open_shards
from re2tal.data.streaming.stream import ClipConfig
from re2tal.data.streaming.windows import ResizeWhole, Slide, Trimmed, Windowing
from re2tal.extraction import Extractor, weights_sha256
from re2tal.options import COUNT, NOT_NEGATIVE, POSITIVE, RATE, SHARE, check_options
from re2tal.progress import counted
from re2tal.runs.devices import named_device
from re2tal.runs.folder import CONFIG_NAME
from re2tal.runs.shard_building import parse_part
from re2tal.runs.trained import load_detector
from re2tal.structures import VideoRecord
from re2tal.training.config import DTYPES, WeightType
from re2tal.training.generators import seed_generators

WINDOW_FRAMES, SIZE = 64, 224
"""Without a run."""


@dataclass(frozen=True, slots=True)
class Extract:
    """Run a backbone over whole videos, window by window, and store its features.

    Either --run, for the backbone of a trained detector and its windows, or --backbone. Safe to stop and
    to run again: finished shards are kept. Exit status 3 if more than --max-rejected of a subset's videos cannot be
    used, 2 for wrong input.
    """

    shards: tuple[Path, ...]
    """Folders of one subset each, as `re2tal shards build` wrote them."""
    out: Path
    """Folder to write to; each subset gets a folder in it."""
    run: Path | None = None
    """Run folder whose backbone, windows and pictures to take."""
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    """Without a run: the network and its weights."""
    window_frames: int | None = None
    """Frames in one window; by default those of the run, or 64."""
    overlap: float = 0.5
    """Share of a window that the next one sees again; each step is taken from where it lies most inside. 0: windows
    that abut."""
    fps: float | None = None
    """Rate at which frames are taken; by default that of the run, or of the shards."""
    whole: int | None = None
    """Take every video as so many frames, in one window, instead."""
    size: int | None = None
    """Height and width of the pictures; by default those of the run, or 224."""
    fit: Literal["crop", "stretch"] | None = None
    """How a picture becomes square: its middle is cut out, or it is squeezed; by default as in the run, or "crop"."""
    dtype: StoredType = "float16"
    """Number type of the stored features."""
    precision: WeightType = "fp32"
    """Number type of the backbone."""
    batch_size: int = 4
    """Windows in one forward."""
    workers: int = 2
    """Processes that read and decode; 0: this one."""
    device: str | None = None
    """cpu, cuda, cuda:1, ...; by default an accelerator if there is one."""
    seed: int = 0
    """Of random weights; `re2tal train` with this seed starts from the same ones."""
    part: str = "0/1"
    """i/n makes the i-th (from 0) of n parts, on other devices or machines; the last to end writes the manifest."""
    max_rejected: float = 0.05
    """Share of a subset's videos that may be unusable without the exit status saying so."""


def extract(options: Extract) -> list[BuiltSubset]:
    """Extract the features of each folder of shards; what was written, in their order."""
    _refuse_wrong_options(options)
    part_index, num_parts = parse_part(options.part)
    config = None if options.run is None else load_config(options.run / CONFIG_NAME)
    if NAME in (options.backbone.name, config and config.backbone.name):
        raise ValueError(f"the backbone is {NAME!r}, which is no network; name one, or the run of one")
    # All folders are opened before the first is worked on, which takes hours.
    folders = [(shards, clip_config(options, config, shards)) for shards in map(open_shards, options.shards)]
    backbone, settings, weights = _backbone(options, config)
    # Before it is narrowed: the same weights have one name, whatever they compute in.
    sha256 = weights_sha256(backbone)
    backbone = backbone.to(named_device(options.device), DTYPES[options.precision])
    written = []
    for shards, clips in folders:
        origin = Extracted(
            backbone=settings.name,
            weights=weights,
            weights_sha256=sha256,
            settings=asdict(settings),
            clips={"windowing": asdict(clips.windowing), "size": clips.size, "fit": clips.fit},
            precision=options.precision,
            shards_sha256=shards.manifest_sha256,
        )
        build = FeatureBuild(
            folder=options.out / shards.subset,
            dataset=shards.manifest.dataset,
            subset=shards.subset,
            classes=shards.classes,
            spec=FeatureSpec(backbone.out_channels, options.dtype, grid_of(clips, backbone.frames_per_step), origin),
            part_index=part_index,
            num_parts=num_parts,
        )
        decoder = "decord" if config is None else config.data.decoder
        extractor = Extractor(backbone, clips, options.batch_size, decoder)
        written.append(build.run(shards_like(shards), partial(_with_bar, extractor, shards)))
    return written


def _with_bar(extractor: Extractor, shards: ShardSet, records: Sequence[VideoRecord]) -> Iterator[Computed | str]:
    return counted(extractor.run(shards, records), total=len(records), about=shards.subset)


def clip_config(options: Extract, config: RunConfig | None, shards: ShardSet) -> ClipConfig:
    """The clips that the backbone sees of `shards`: those of the run, unless an option says otherwise."""
    base = ClipConfig(size=SIZE) if config is None else config.data.clips
    return replace(
        base,
        windowing=_windowing(options, None if config is None else base.windowing, shards),
        size=options.size or base.size,
        fit=options.fit or base.fit,
        workers=options.workers,
    )


def _windowing(options: Extract, trained: Windowing | None, shards: ShardSet) -> Windowing:
    slides = options.window_frames is not None or options.fps is not None
    if options.whole is not None:
        if slides:
            raise ValueError(f"whole = {options.whole} excludes window_frames and fps; give one or the other")
        return ResizeWhole(num_frames=options.whole)
    match trained, shards.manifest.encoding.sampling:
        # As trained, unless windows are asked for: a window of such a model is a whole video.
        case ResizeWhole(), _ if not slides:
            return trained
        case None, FramesPerVideo(num_frames) if not slides:
            return ResizeWhole(num_frames=num_frames)
        case (Slide() | Trimmed()) as windowing, sampling:
            num_frames, rate = windowing.num_frames, windowing.frames_per_second
        case _, sampling:
            num_frames, rate = WINDOW_FRAMES, None
    if options.fps is None and isinstance(trained, Slide) and trained.frame_stride > 1:
        raise ValueError(
            f"{options.run} takes one of {trained.frame_stride} frames of each video's own rate, and features have one "
            "rate for all; give fps"
        )
    rate = options.fps or rate or (sampling.fps if isinstance(sampling, FramesPerSecond) else None)
    if rate is None:
        raise ValueError(f"{shards.root} stores whole videos as so many frames; give fps too, or whole")
    return Slide(options.window_frames or num_frames, frames_per_second=rate, overlap=options.overlap)


def _refuse_wrong_options(options: Extract) -> None:
    counts = {"window_frames": COUNT, "whole": COUNT, "size": COUNT, "batch_size": COUNT, "fps": POSITIVE}
    check_options(options, **counts, overlap=RATE, workers=NOT_NEGATIVE, seed=NOT_NEGATIVE, max_rejected=SHARE)
    if not options.shards:
        raise ValueError("no folder of shards was named; give those that `re2tal shards build` wrote")
    if options.run is not None and options.backbone != BackboneConfig():
        raise ValueError(f"the run {options.run} brings its own backbone; give either a run or a backbone")


def _backbone(options: Extract, config: RunConfig | None) -> tuple[VideoBackbone, BackboneConfig, str]:
    """The backbone, its configuration, and where its weights come from."""
    if config is not None and options.run is not None:
        return load_detector(options.run, config).backbone, config.backbone, f"trained by run {config.name}"
    seed_generators(options.seed)
    settings = options.backbone
    check_wiring(settings)
    return build_backbone(settings), settings, settings.weights or f"random, seed {options.seed}"


def grid_of(clips: ClipConfig, frames_per_step: int) -> FeatureGrid:
    """The grid of feature steps for such clips."""
    match clips.windowing:
        case ResizeWhole(num_frames=num_frames):
            return StepsPerVideo(num_frames // frames_per_step)
        case Slide(frames_per_second=float(rate)):
            return SecondsPerStep(frames_per_step / rate)
        case windowing:
            raise AssertionError(windowing)  # clip_config makes no other


def shards_like(shards: ShardSet) -> list[FeatureShard]:
    """The same videos in shards of the same names."""
    # Videos stand in the order of their shards.
    by_name = groupby(shards.videos, key=lambda video: video.shard)
    return [FeatureShard(name, tuple(video.record for video in videos)) for name, videos in by_name]
