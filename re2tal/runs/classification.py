"""Classify trimmed videos with a trained recognizer, and score it where the truth is known."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from re2tal.config import RecognitionConfig, load_run
from re2tal.data.building.clips import true_classes
from re2tal.data.contract.manifest import Rejection
from re2tal.evaluation.accuracy import accuracy
from re2tal.evaluation.video_classes import write_video_classes
from re2tal.files import output_file
from re2tal.inference import classify as classify_batches
from re2tal.options import COUNT, check
from re2tal.runs.detection_sources import batch_of, batches_with_bar, open_source
from re2tal.runs.devices import named_device
from re2tal.runs.folder import CONFIG_NAME, RESULTS_NAME
from re2tal.runs.trained import load_recognizer
from re2tal.runs.video_files import list_videos, pack_videos
from re2tal.training.config import DTYPES


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassificationOptions:
    """Which videos to classify, by which recognizer."""

    run: Path
    """Folder of a recognizer's training run: config.json and model.safetensors."""
    videos: Path | None = None
    """Folder of trimmed video files, sub-folders too, of any format and size; each one's best classes are printed."""
    shards: Path | None = None
    """Folder of one subset's shards instead, by default the run's validation shards; top-1, top-5 and mean class
    accuracy are printed."""
    out: Path | None = None
    """JSON to write; by default RUN/results.json, or RUN/classes.json for other videos than the run's."""
    top: int = 3
    """How many classes of each of --videos to print, at most."""
    batch_size: int | None = None
    """Clips in one forward; by default as in training."""
    device: str | None = None
    """"cpu", "cuda", "cuda:1", ...; by default an accelerator if there is one."""

    def __post_init__(self) -> None:
        check("top", self.top, COUNT)


@dataclass(frozen=True, slots=True)
class Classified:
    """The classes of videos, by a trained recognizer."""

    path: Path
    """The JSON that was written."""
    scores: Mapping[str, Tensor]
    """The probabilities of all classes, by video."""
    about: str
    """The accuracy, where the truth is known, or each video's best classes: lines of text."""
    rejected: Sequence[Rejection]
    """Video files that could not be used."""


def classify(options: ClassificationOptions) -> Classified:
    """Write the probabilities that the recognizer of a run folder gives to all classes to a JSON."""
    run, videos = options.run, options.videos
    config = load_run(run / CONFIG_NAME)
    if not isinstance(config, RecognitionConfig):
        raise ValueError(f"{run} is the run of a detector, which says when something happens too; use re2tal detect")
    data = open_source(config, videos=videos, shards=options.shards)
    of_run = videos is None and options.shards is None
    target = output_file(options.out or run / (RESULTS_NAME if of_run else "classes.json"), option="--out")
    chosen = named_device(options.device)
    recognizer = load_recognizer(run, config).to(chosen, DTYPES[config.engine.precision])
    classes = recognizer.classes
    batch_size = batch_of(options.batch_size, config)
    rejected: list[Rejection] = []
    if data is not None:
        # Shards of videos that nobody has annotated can be classified, but not scored.
        truth = true_classes(data) if any(video.record.actions for video in data.videos) else {}
        if unknown := sorted(set(truth.values()) - set(classes)):
            raise ValueError(
                f"{data.root} shows {unknown[0]!r}, like {len(unknown)} classes in all, which {run} does not know; "
                "give shards of the classes that it was trained for"
            )
        batches = batches_with_bar(data, config.data, batch_size=batch_size)
        found = classify_batches(recognizer, batches, device=chosen)
        about = f"{accuracy(found, truth, classes=classes)}\n" if truth else ""
    else:
        assert videos is not None
        with tempfile.TemporaryDirectory(prefix="re2tal-classify-") as scratch:
            data, names, rejected = pack_videos(list_videos(videos), Path(scratch), config.data.clips, classes=classes)
            batches = batches_with_bar(data, config.data, batch_size=batch_size)
            found = classify_batches(recognizer, batches, device=chosen)
        # In the scratch folder videos have numbers; results carry the names of their files.
        found = {names[video_id]: scores for video_id, scores in found.items()}
        about = "".join(f"{name}: {_best(scores, classes, options.top)}\n" for name, scores in found.items())
    write_video_classes(target, found, classes)
    return Classified(target, found, about, rejected)


def _best(scores: Tensor, classes: tuple[str, ...], top: int) -> str:
    best = scores.topk(min(top, len(classes)))
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return ", ".join(f"{classes[index]} {score:.3f}" for index, score in pairs)
