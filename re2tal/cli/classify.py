"""`re2tal classify`: what trimmed videos show, by a trained recognizer, and how often it is right."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from re2tal.cli.detect import default_device, pack_videos, started
from re2tal.cli.feature_run import check_kind
from re2tal.config import RecognitionConfig, build_recognizer, load_run
from re2tal.data.building.clips import true_classes
from re2tal.data.contract.manifest import Rejection
from re2tal.data.contract.shards import FeatureSet, ShardSet, open_any
from re2tal.data.streaming.stream import stream_clips
from re2tal.evaluation.accuracy import accuracy
from re2tal.evaluation.video_classes import write_video_classes
from re2tal.inference import classify as classify_batches
from re2tal.recognizer import Recognizer
from re2tal.training.engine import DTYPES
from re2tal.training.export import read_model


def classify(
    *,
    run: Path,
    videos: Path | None = None,
    shards: Path | None = None,
    out: Path | None = None,
    top: int = 3,
    batch_size: int | None = None,
    device: str | None = None,
) -> int:
    """Write the probabilities of all classes to a JSON that `re2tal evaluate` and `re2tal detect --video-classes` read.

    Exit status 1 if some videos could not be used.

    Args:
        run: folder of a recognizer's training run: config.json and model.safetensors
        videos: folder of trimmed video files, of any format and size; each one's best classes are printed
        shards: folder of one subset's shards instead, by default the run's validation shards; top-1, top-5 and mean
            class accuracy are printed
        out: JSON to write; by default RUN/results.json, or RUN/classes.json for other videos than the run's
        top: how many classes of each of --videos to print, at most
        batch_size: clips in one forward; by default as in training
        device: "cpu", "cuda", "cuda:1", ...; by default an accelerator if there is one
    """
    if videos is not None and shards is not None:
        raise ValueError(f"--videos {videos} and --shards {shards} were both given; give one of them")
    if top < 1:
        raise ValueError(f"--top is {top}; give 1 or more")
    config = load_run(run / "config.json")
    if not isinstance(config, RecognitionConfig):
        raise ValueError(f"{run} is the run of a detector, which says when something happens too; use re2tal detect")
    target = out or run / ("results.json" if videos is None and shards is None else "classes.json")
    chosen = torch.device(device) if device else default_device()
    recognizer = load_recognizer(run, config).to(chosen, DTYPES[config.engine.precision])
    classes = recognizer.classes
    batch_size = batch_size or config.engine.batch_size
    rejected: list[Rejection] = []
    if videos is None:
        data = open_any(shards or config.data.shards / config.data.validation_subset)
        check_kind(config, data)
        truth = true_classes(data) if any(video.record.actions for video in data.videos) else {}
        if unknown := sorted(set(truth.values()) - set(classes)):
            raise ValueError(
                f"{data.root} shows {unknown[0]!r}, like {len(unknown)} classes in all, which {run} does not know; "
                "give shards of the classes that it was trained for"
            )
        found = _look(recognizer, data, config, batch_size=batch_size, device=chosen)
        about = f"{accuracy(found, truth, classes=classes)}\n" if truth else ""
    else:
        with tempfile.TemporaryDirectory(prefix="re2tal-classify-") as scratch:
            data, names, rejected = pack_videos(videos, Path(scratch), config.data.clips, classes=classes)
            found = _look(recognizer, data, config, batch_size=batch_size, device=chosen)
        found = {names[video_id]: scores for video_id, scores in found.items()}
        about = "".join(f"{name}: {_best(scores, classes, top)}\n" for name, scores in found.items())
    write_video_classes(target, found, classes)
    for rejection in rejected:
        print(f"left out: {rejection.video_id}: {rejection.reason}", file=sys.stderr)
    print(f"{about}{len(found)} videos; {target}")
    return 1 if rejected else 0


def load_recognizer(run: Path, config: RecognitionConfig) -> Recognizer:
    """The recognizer of a run folder with its trained weights, on the CPU."""
    model = read_model(run / "model.safetensors")
    recognizer, _ = build_recognizer(started(config), model.classes)
    model.load_into(recognizer, classes=recognizer.classes)
    return recognizer


def _look(
    recognizer: Recognizer,
    shards: ShardSet | FeatureSet,
    config: RecognitionConfig,
    *,
    batch_size: int,
    device: torch.device,
) -> Mapping[str, Tensor]:
    clips = stream_clips(shards, config.data.clips, batch_size=batch_size, training=False)
    batches = tqdm(clips.epoch(0), total=clips.steps_per_epoch, unit="batch", disable=not sys.stderr.isatty())
    return classify_batches(recognizer, batches, device=device)


def _best(scores: Tensor, classes: tuple[str, ...], top: int) -> str:
    best = scores.topk(min(top, len(classes)))
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return ", ".join(f"{classes[index]} {score:.3f}" for index, score in pairs)
