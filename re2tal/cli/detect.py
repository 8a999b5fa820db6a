"""`re2tal detect`: find actions with a trained detector, in a folder of video files or in shards."""

from __future__ import annotations

from pathlib import Path

from re2tal.cli.say import say_detected
from re2tal.runs.detection import detect as detect_in


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
    done = detect_in(
        run,
        videos=videos,
        shards=shards,
        out=out,
        video_classes=video_classes,
        top_k=top_k,
        batch_size=batch_size,
        device=device,
    )
    return say_detected(done)
