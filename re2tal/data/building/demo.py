"""A small data set of real video files whose actions can only be told by their motion; `demo_scenes` draws them.

Files are as people have them: H.264 in MP4 with B-frames and long groups of pictures, four frame rates, several sizes.
The same seed gives the same frames and annotations anywhere, and the same bytes where the encoder is the same.
Mirroring a picture turns one class into another: train on this with flips off.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

import av

from re2tal.data.building.demo_scenes import CLASSES, SUBSETS, Scene, draw_clip, draw_scene
from re2tal.machine import num_workers
from re2tal.strict_json import read_json, write_json

T = TypeVar("T")


@dataclass(frozen=True)
class DemoConfig:
    """What to write."""

    num_training: int = 96
    """videos in the training subset"""
    num_validation: int = 48
    """videos in the validation subset"""
    seed: int = 0
    """everything follows from it: another seed, another data set of the same kind"""

    def __post_init__(self) -> None:
        for name in ("num_training", "num_validation"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; a subset needs at least 1 video")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; give 0 or more")


def write_demo(folder: Path, config: DemoConfig, *, workers: int | None = None) -> Path:
    """Write `folder`/videos/*.mp4, then `folder`/annotations.json, whose path is returned.

    With the annotations of the same config already there, nothing is done. `workers` processes draw (default: one per
    core that this process may use); their number does not change the result.

    Raises:
        ValueError: if `folder` holds the annotations of something else, or for fewer than one process.
    """
    annotations = folder / "annotations.json"
    version = f"re2tal demo 2, {config}"  # another number whenever the drawing changes
    if not _is_written(annotations, version):
        (folder / "videos").mkdir(parents=True, exist_ok=True)
        written = _in_processes(partial(_write_video, folder / "videos", config.seed), config, workers=workers)
        write_json(annotations, {"version": version, "taxonomy": _taxonomy(), "database": dict(written)})
    return annotations


def write_demo_clips(folder: Path, config: DemoConfig, *, workers: int | None = None) -> Path:
    """As `write_demo`, but trimmed clips: `folder`/clips/SUBSET/CLASS/*.mp4, then `folder`/clips.json, whose path is
    returned. Every class has as many clips as any other, or one more."""
    listing = folder / "clips.json"
    version = f"re2tal demo clips 1, {config}"
    if not _is_written(listing, version):
        for subset in SUBSETS:
            for label in CLASSES:
                (folder / "clips" / subset / label).mkdir(parents=True, exist_ok=True)
        written = _in_processes(partial(_write_clip, folder / "clips", config.seed), config, workers=workers)
        write_json(listing, {"version": version, "clips": written})
    return listing


def _is_written(listing: Path, version: str) -> bool:
    """Whether the file that is written last is there; ValueError where it is of something else."""
    if not listing.exists():
        return False
    found = read_json(listing)
    if not isinstance(found, dict) or found.get("version") != version:
        raise ValueError(f"{listing} is not of {version!r}; choose another folder, or delete this one")
    return True


def _in_processes(write: Callable[[tuple[str, int]], T], config: DemoConfig, *, workers: int | None) -> list[T]:
    counts = (config.num_training, config.num_validation)
    jobs = [(subset, number) for subset, count in zip(SUBSETS, counts, strict=True) for number in range(count)]
    context, ignored = get_context("spawn"), (signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C means
    try:
        with ProcessPoolExecutor(num_workers(workers), context, initializer=signal.signal, initargs=ignored) as pool:
            return list(pool.map(write, jobs, chunksize=2))
    except BrokenProcessPool:
        raise ChildProcessError(
            "a process that drew videos was killed, most often for lack of memory; start again with fewer --workers"
        ) from None


def _taxonomy() -> list[dict[str, object]]:
    root: dict[str, object] = {"nodeId": 0, "nodeName": "Root", "parentId": None, "parentName": None}
    leaves = [
        {"nodeId": number, "nodeName": label, "parentId": 0, "parentName": "Root"}
        for number, label in enumerate(CLASSES, start=1)
    ]
    return [root, *leaves]


def _write_video(folder: Path, seed: int, job: tuple[str, int]) -> tuple[str, dict[str, object]]:
    subset, number = job
    scene = draw_scene(subset=subset, number=number, seed=seed)
    record = scene.record
    width, height = _encode(scene, folder / f"{record.video_id}.mp4")
    return record.video_id, {
        "duration": record.duration_seconds,
        "subset": subset,
        "resolution": f"{width}x{height}",
        "url": "",
        "annotations": [
            {"segment": [action.start_seconds, action.end_seconds], "label": action.label} for action in record.actions
        ],
    }


def _write_clip(folder: Path, seed: int, job: tuple[str, int]) -> str:
    subset, number = job
    scene = draw_clip(subset=subset, number=number, seed=seed)
    (action,) = scene.record.actions
    path = folder / subset / action.label / f"{scene.record.video_id}.mp4"
    _encode(scene, path)
    return str(path.relative_to(folder))


def _encode(scene: Scene, path: Path) -> tuple[int, int]:
    """Write a scene to a file; gives its (width, height)."""
    partial_file = path.with_suffix(".mp4.partial")
    with av.open(str(partial_file), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=scene.rate, options={"preset": "superfast", "crf": "20"})
        stream.height, stream.width = scene.background.shape[:2]
        stream.pix_fmt = "yuv420p"
        # Threads would change the bytes from machine to machine, and each process draws a video of its own.
        stream.thread_count = 1
        for number in range(len(scene.shifts)):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(scene.frame(number), format="rgb24")))
        container.mux(stream.encode(None))
    partial_file.replace(path)
    return stream.width, stream.height
