"""Detect actions with a trained detector, in video files or in shards.

video files -> decoded once, as a stream -> windows -> results, video by video
shards      -> windows of all videos -> results
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from tqdm import tqdm

from re2tal.backbones.stored import NAME
from re2tal.config import DataConfig, RecognitionConfig, RunConfig
from re2tal.data.building.probe import MAX_DAMAGED
from re2tal.data.contract.manifest import Rejection
from re2tal.data.contract.shards import FeatureSet, ShardSet, open_any, subset_folder
from re2tal.data.streaming.stream import stream_clips
from re2tal.distributed import World, together
from re2tal.evaluation.selection import Selection, labels_of
from re2tal.evaluation.video_classes import Fusion, VideoClasses
from re2tal.inference import average_flips, predict
from re2tal.reporting.found import FoundInVideo
from re2tal.reporting.result_files import RESULT_FORMATS, ResultsFile, choose_format
from re2tal.runs.file_detection import Look, detect_in_files
from re2tal.runs.model_folder import SHIPPED
from re2tal.runs.model_folder_hub import find_model
from re2tal.runs.naming import read_namer
from re2tal.runs.progress import Progress
from re2tal.runs.ranks import device_of, joined_ranks
from re2tal.runs.stored_features import check_features, check_kind
from re2tal.runs.trained import Trained, open_detector
from re2tal.runs.video_files import VideoFiles, encoding_for, find_videos
from re2tal.structures import Batch
from re2tal.training.config import DTYPES

SAVE_SECONDS = 10.0
"""What is found is written at least so often, while videos are looked at."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which detections to write, and how."""

    out: Path | None = None
    """None: a file in the model's folder, or in the working directory for the package's own model or one of the hub"""
    format_name: str | None = None
    min_score: float | None = None
    """None: that of the format"""
    top: int | None = None
    classes: Sequence[str] = ()
    video_classes: Path | None = None
    top_k: int = 2
    fusion: Fusion = "product"
    flip: bool = False
    """Average what the network says of clips and of their mirror images."""


@dataclass(frozen=True, slots=True)
class Detected:
    """Detections of a trained detector, as they were written."""

    path: Path
    """The results that were written: a file, or a folder of one file per video."""
    format_name: str
    checkpoint: str | None
    """The checkpoint that the weights come from, where the run has not ended."""
    num_videos: int
    num_detections: int
    rejected: Sequence[Rejection]
    """Video files that could not be used."""
    odd: Sequence[Path]
    """Files in the folders that are no videos by their suffix."""
    min_score: float
    cut_videos: Mapping[str, int]
    """Videos with more detections than suppression.max_per_video -> how many it cut, at most."""
    is_main: bool = True
    """Whether this is the rank that tells."""


def detect(
    model: Path = SHIPPED,
    paths: Sequence[Path] = (),
    *,
    recursive: bool = False,
    shards: Path | None = None,
    wanted: Wanted | None = None,
    batch_size: int | None = None,
    device: str | None = None,
    max_damaged: float = MAX_DAMAGED,
    say: Callable[[FoundInVideo], str] | None = None,
) -> Detected:
    """Detect actions in video files and folders of them, or in shards; write what is found.

    Every rank calls this. The arguments are those of `re2tal detect`; `say` makes of each video what is printed.
    """
    wanted = wanted or Wanted()
    with joined_ranks() as world:
        model, asked = find_model(model), model
        if not paths and shards is None and model == SHIPPED:
            raise ValueError("the model that comes with the package has no videos of its own; give videos to look at")
        home = Path() if model == SHIPPED or model != asked else model
        job = _Job.prepared(home, model, paths, shards, wanted, world, recursive=recursive)
        if paths:
            encoding_for(job.trained.config.data.clips)  # raises where the rate is not known
        if wanted.flip:
            check_looks_at_videos(model, job.trained.config, asked="flip, of frames,")
        chosen = device_of(world, device)
        config = job.trained.config
        network = job.trained.network().to(chosen, DTYPES[config.engine.precision])
        if wanted.flip:
            average_flips(network)
        look = Look(network, config, chosen, batch_size or config.engine.batch_size, job.early, max_damaged)
        if job.shards is None:
            _look_at_files(job, look, world, say)
        else:
            _look_at_shards(job, look, world)
        return job.done(world)


@dataclass(slots=True)
class _Job:
    """What is to be looked at, and what was found in it."""

    trained: Trained
    results: ResultsFile
    selection: Selection
    """Of what is written."""
    early: Selection
    """Of what the network finds, before videos' classes name it."""
    files: VideoFiles
    shards: ShardSet | FeatureSet | None
    namer: VideoClasses | None
    top_k: int
    target: Path
    found: list[tuple[str, int]] = field(default_factory=list)
    """Name of each video, and how many detections the limit on their number left out, at most."""
    rejected: list[Rejection] = field(default_factory=list)

    @classmethod
    def prepared(
        cls,
        home: Path,
        model: Path,
        paths: Sequence[Path],
        shards: Path | None,
        wanted: Wanted,
        world: World,
        *,
        recursive: bool,
    ) -> _Job:
        """All that can be wrong is found before any network runs."""
        if paths and shards is not None:
            raise ValueError(f"videos {paths[0]} and shards {shards} were both given; give one of them")
        format_name = choose_format(wanted.format_name, wanted.out)
        row = RESULT_FORMATS[format_name]
        trained = open_detector(model)
        if paths:
            check_looks_at_videos(model, trained.config, asked=f"{paths[0]}")
        opened = None if paths else open_source(trained.config, videos=None, shards=shards)
        if isinstance(opened, FeatureSet):
            check_features(opened, trained.features, run=model)
        files = find_videos(paths, recursive=recursive) if paths else VideoFiles({}, [])
        namer = read_namer(wanted.video_classes, trained.config, top_k=wanted.top_k, fusion=wanted.fusion)
        if namer is not None:
            namer.check(files.names.values() if opened is None else opened.by_id, top_k=wanted.top_k)
        classes = trained.classes if namer is None else namer.classes
        min_score = row.min_score if wanted.min_score is None else wanted.min_score
        selection = Selection(min_score, wanted.top, labels_of(classes, wanted.classes))
        early = selection if namer is None else Selection()
        stem = "results" if paths == () and shards is None else "detections"
        default = home / (stem if row.for_each else f"{stem}{row.suffix}")
        target = wanted.out or default
        if row.for_each and target.suffix.lower() == row.suffix and len(files.names) != 1:
            raise ValueError(
                f"out is {target}, one file, but {format_name} has a file for each of the "
                f"{len(files.names) if paths else 'shards'} videos; give a folder"
            )
        mine = target if world.is_main else target.with_name(f"{target.stem}.rank{world.rank}{target.suffix}")
        results = ResultsFile(target if row.for_each else mine, format_name, classes)
        return cls(trained, results, selection, early, files, opened, namer, wanted.top_k, target)

    def add(self, video: FoundInVideo) -> FoundInVideo:
        """Name and write what was found in a video; gives what was written."""
        self.found.append((video.name, video.detections.num_cut or 0))
        if self.namer is not None:
            named = self.namer.name({video.name: video.detections}, top_k=self.top_k)[video.name]
            video = replace(video, detections=self.selection.after(named), classes=self.namer.classes)
        self.results.add(video)
        return video

    def done(self, world: World) -> Detected:
        """Every rank calls this, when its share is done."""
        shares = together(lambda: (self.found, self.rejected, self.results.found, self.results.num_written))
        order = {name: place for place, name in enumerate(self.files.names.values())}
        rejected = sorted((one for share in shares for one in share[1]), key=lambda one: order[one.video_id])
        num_videos = sum(len(share[0]) for share in shares)
        if self.files.names and not num_videos:
            raise ValueError(
                f"none of the {len(rejected)} videos can be used; {rejected[0].video_id}: {rejected[0].reason}"
            )
        if world.is_main:
            self.results.found = sorted(
                (one for share in shares for one in share[2]), key=lambda one: order.get(one.name, 0)
            )
            self.results.write()
        elif not self.results.is_per_video:
            self.results.out.unlink(missing_ok=True)
        return Detected(
            path=self.target,
            format_name=self.results.format_name,
            checkpoint=self.trained.checkpoint,
            num_videos=num_videos,
            num_detections=sum(share[3] for share in shares),
            rejected=rejected,
            odd=self.files.odd,
            min_score=self.selection.min_score,
            cut_videos={name: count for share in shares for name, count in share[0] if count},
            is_main=world.is_main,
        )


def _look_at_files(job: _Job, look: Look, world: World, say: Callable[[FoundInVideo], str] | None) -> None:
    mine = dict(list(job.files.names.items())[world.rank :: world.world_size])
    progress = Progress(sum(path.stat().st_size for path in mine if path.exists()), shown=world.is_main)
    saved, cost = time.monotonic(), 0.0
    try:
        for one in detect_in_files(look, mine, progress=progress):
            if isinstance(one, Rejection):
                job.rejected.append(one)
                continue
            written = job.add(one)
            if say is not None:
                progress.say(say(written))
            if (now := time.monotonic()) - saved > max(SAVE_SECONDS, 20 * cost):
                job.results.write()
                saved = time.monotonic()
                cost = saved - now
    except KeyboardInterrupt:
        if job.found:
            job.results.write()
            print(f"{len(job.found)} of {len(mine)} videos are in {job.results.out}", file=sys.stderr)
        raise
    finally:
        progress.close()


def _look_at_shards(job: _Job, look: Look, world: World) -> None:
    assert job.shards is not None
    batches = batches_with_bar(job.shards, look.config.data, batch_size=look.batch_size, world=world)
    found = predict(look.network, batches, suppression=look.config.suppression, device=look.device)
    if not world.is_main:
        return
    for video_id, detections in found.items():
        seconds = job.shards.by_id[video_id].record.duration_seconds
        chosen = look.selection.after(detections)
        job.add(FoundInVideo(video_id, None, seconds, chosen, job.trained.classes))


def check_looks_at_videos(run: Path, config: RunConfig, *, asked: str) -> None:
    """ValueError where the detector of `run` takes stored features, and `asked` names videos."""
    if config.backbone.name == NAME:
        raise ValueError(
            f"{asked} was asked for, but {run} was trained on stored features and has no network that looks at videos; "
            "pack these videos (re2tal shards build), extract their features as those of its training were (re2tal "
            "features extract), and detect in that folder (shards)"
        )


def batches_with_bar(
    shards: ShardSet | FeatureSet, data: DataConfig, *, batch_size: int, world: World | None = None
) -> Iterable[Batch]:
    """This rank's clips of `shards`, once, with a progress bar on a terminal."""
    world = world or World()
    stream = stream_clips(
        shards,
        data.clips,
        batch_size=batch_size,
        training=False,
        rank=world.rank,
        world_size=world.world_size,
        decoder=data.decoder,
    )
    hidden = not (world.is_main and sys.stderr.isatty())
    return tqdm(stream.epoch(0), total=stream.steps_per_epoch, unit="batch", disable=hidden)


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
