"""What is to be detected, checked before any network runs, and what was found, written as it comes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from re2tal.config import RunConfig, to_json
from re2tal.data.addresses.address import as_address
from re2tal.data.contract.manifest import Rejection
from re2tal.data.contract.shards import FeatureSet, ShardSet
from re2tal.distributed import World, together
from re2tal.evaluation.selection import Selection, labels_of
from re2tal.evaluation.video_classes import Fusion, VideoClasses, read_video_classes
from re2tal.files import is_stream, output_file, sha256_of
from re2tal.options import COUNT, SHARE, check_options
from re2tal.reporting.found import FoundInVideo
from re2tal.reporting.result_files import RESULT_FORMATS, ResultsFile, choose_format
from re2tal.runs.detection_sources import check_looks_at_videos, open_source
from re2tal.runs.stored_features import check_features
from re2tal.runs.trained import Trained, open_detector
from re2tal.runs.video_files import VideoFiles, find_videos


@dataclass(frozen=True, slots=True)
class DetectionOptions:
    """Which detections to write, and how."""

    out: Path | None = None
    """where to write; its suffix says the format: .json, .csv, .srt, .vtt, .eaf (ELAN), .tsv (BORIS). For srt, vtt and
    eaf of several videos it is a folder. By default MODEL/detections.json, or MODEL/results.json for the validation
    shards; for the model of the package or the hub in the working directory"""
    format: Literal["json", "csv", "srt", "vtt", "eaf", "boris"] | None = None
    """json is ActivityNet's layout, for re2tal evaluate; csv a table; srt and vtt are subtitles, for players; eaf and
    boris (aggregated events) are for correcting in ELAN and BORIS"""
    min_score: float | None = None
    """leave out what has a lower score; by default 0, and 0.3 for srt, vtt, eaf and boris"""
    top: int | None = None
    """write at most so many of each video, the surest ones"""
    classes: tuple[str, ...] = ()
    """write only these classes"""
    video_classes: Path | None = None
    """scores of a classifier of whole videos that name what a class-agnostic detector finds; without it the results'
    only class is "action". JSON, {"results": {ID: [K scores]}, "class": [K names]} (CUHK, InternVideo; [[K logits]] for
    TCANet), or UntrimmedNet's .npy for THUMOS-14"""
    top_k: int = 2
    """with --video-classes, each detection is written once for each of its video's so many best classes"""
    fusion: Fusion = "product"
    """with --video-classes, a score is the detection's times its class's, or the square root of that, as published for
    InternVideo"""
    add: bool = False
    """keep the results that are there already, and look only at the videos that they lack: goes on where a command was
    stopped. Of json: results of other weights, options or files are refused; of srt, vtt and eaf: a video is left out
    that has a file, whoever wrote it"""
    flip: bool = False
    """look at each clip and its mirror image, and average what the network says of both; takes twice as long"""


AS_USUAL = DetectionOptions()


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
    num_kept: int = 0
    """Videos whose results were there already, and were kept."""
    spared: Path | None = None
    """The file that was to be written, where another program wrote it meanwhile: it stays as that left it."""
    is_main: bool = True
    """Whether this is the rank that tells."""


@dataclass(slots=True)
class Job:
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
    num_kept: int = 0
    found: list[tuple[str, int]] = field(default_factory=list)
    """Name of each video, and how many detections the limit on their number left out, at most."""
    rejected: list[Rejection] = field(default_factory=list)

    @classmethod
    def prepared(
        cls,
        home: Path,
        model: Path,
        paths: Sequence[Path | str],
        shards: Path | None,
        wanted: DetectionOptions,
        world: World,
        *,
        recursive: bool,
    ) -> Job:
        """All that can be wrong is found before any network runs."""
        check_options(wanted, min_score=SHARE, top=COUNT, top_k=COUNT)
        first = str(as_address(paths[0]) or paths[0]) if paths else ""
        if paths and shards is not None:
            raise ValueError(f"videos {first} and shards {shards} were both given; give one of them")
        # In this order: what costs nothing to check comes before what opens files.
        format_name = choose_format(wanted.format, wanted.out)
        row = RESULT_FORMATS[format_name]
        trained = open_detector(model)
        if paths:
            check_looks_at_videos(model, trained.config, asked=first)
        opened = None if paths else open_source(trained.config, videos=None, shards=shards)
        if isinstance(opened, FeatureSet):
            check_features(opened, trained.features, run=model)
        files = find_videos(paths, recursive=recursive) if paths else VideoFiles({}, [])
        namer = _namer(wanted, trained.config)
        if namer is not None:
            namer.check(files.names.values() if opened is None else opened.by_id, top_k=wanted.top_k)
        classes = trained.classes if namer is None else namer.classes
        min_score = row.min_score if wanted.min_score is None else wanted.min_score
        selection = Selection(min_score, wanted.top, labels_of(classes, wanted.classes))
        # With a classifier scores become products: nothing may be left out by its score, or number, before.
        early = selection if namer is None else Selection()
        stem = "results" if not paths and shards is None else "detections"
        default = home / (stem if row.for_each else f"{stem}{row.suffix}")
        target = wanted.out or default
        if row.for_each and target.suffix.lower() == row.suffix and len(files.names) != 1:
            raise ValueError(
                f"out is {target}, one file, but {format_name} has a file for each of the "
                f"{len(files.names) if paths else 'shards'} videos; give a folder"
            )
        if row.for_each is None:
            target = output_file(target, option="--out")
        if is_stream(target) and (wanted.add or world.world_size > 1):
            raise ValueError(
                f"--out is {target}, a pipe or a device, from which nothing can be read back; give a file, or leave "
                "out --add and use one process"
            )
        # Other ranks write beside it; rank 0 puts all together at the end.
        mine = target if world.is_main else target.with_name(f"{target.stem}.rank{world.rank}{target.suffix}")
        # Other formats have no place for it.
        made_with = _made_with(trained, wanted, min_score) if format_name == "json" else {}
        results = ResultsFile(target if row.for_each else mine, format_name, classes, made_with)
        # Every rank comes here, or none: it is a collective.
        kept = _kept(results, files) if wanted.add else set()
        files = replace(files, names={path: name for path, name in files.names.items() if name not in kept})
        return cls(trained, results, selection, early, files, opened, namer, wanted.top_k, len(kept))

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
        # Also of ranks that found nothing.
        shares = together(lambda: (self.found, self.rejected, self.results.found, self.results.num_written))
        order = {name: place for place, name in enumerate(self.files.names.values())}
        # In the order of the files that were given, whichever rank looked at them.
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
        # What rank 0 has written by now holds it.
        elif not self.results.is_per_video:
            self.results.out.unlink(missing_ok=True)
        return Detected(
            path=self.results.out,
            format_name=self.results.format_name,
            checkpoint=self.trained.checkpoint,
            num_videos=num_videos,
            num_detections=sum(share[3] for share in shares),
            rejected=rejected,
            odd=self.files.odd,
            min_score=self.selection.min_score,
            cut_videos={name: count for share in shares for name, count in share[0] if count},
            num_kept=self.num_kept,
            spared=self.results.spared,
            is_main=world.is_main,
        )


def _namer(wanted: DetectionOptions, config: RunConfig) -> VideoClasses | None:
    """The classifier's scores, if asked for; ValueError if the detector of `config` has classes of its own."""
    if wanted.video_classes is None:
        return None
    if not config.localizer.class_agnostic:
        raise ValueError(
            f"video classes, {wanted.video_classes}, were given, but this run's localizer.class_agnostic is false: its "
            "detections have classes of their own; leave the file out, or give the run folder of a class-agnostic "
            "detector"
        )
    namer = read_video_classes(wanted.video_classes, fusion=wanted.fusion)
    # Of no video yet: what can be said before the videos are known.
    namer.check((), top_k=wanted.top_k)
    return namer


def _made_with(trained: Trained, wanted: DetectionOptions, min_score: float) -> dict[str, Any]:
    """What results depend on, beside the videos."""
    return {
        "weights": trained.weights_id,
        # config.json may have been edited since, which weights do not tell.
        "suppression": to_json(trained.config)["suppression"],
        "min_score": min_score,
        "top": wanted.top,
        "classes": sorted(wanted.classes),
        "video_classes": None if wanted.video_classes is None else sha256_of(wanted.video_classes),
        "top_k": wanted.top_k,
        "fusion": wanted.fusion,
        "flip": wanted.flip,
    }


def _kept(results: ResultsFile, files: VideoFiles) -> set[str]:
    """Every rank calls this: names of the videos that need not be looked at again."""
    if not files.names:
        raise ValueError("add is for videos; leave it out for shards")
    here = {name: path if isinstance(path, Path) else None for path, name in files.names.items()}
    # What rank 0 read: the others' own files are not there yet.
    return set(together(lambda: sorted(results.take_up(here)))[0])
