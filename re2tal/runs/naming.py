"""Names for what a class-agnostic detector finds, from a classifier of whole videos."""

from __future__ import annotations

from pathlib import Path

from re2tal.config import RunConfig
from re2tal.evaluation.video_classes import Fusion, VideoClasses, read_video_classes


def read_namer(path: Path | None, config: RunConfig, *, top_k: int, fusion: Fusion) -> VideoClasses | None:
    """The classifier's scores, if asked for; ValueError if the detector of `config` has classes of its own."""
    if path is None:
        return None
    if not config.localizer.class_agnostic:
        raise ValueError(
            f"video classes, {path}, were given, but this run's localizer.class_agnostic is false: its detections have "
            "classes of their own; leave the file out, or give the run folder of a class-agnostic detector"
        )
    namer = read_video_classes(path, fusion=fusion)
    # Of no video yet: what can be said before the videos are known.
    namer.check((), top_k=top_k)
    return namer
