"""What other annotations of a data set cost beside its build.

    python benchmarks/relabel.py [--quick] --json FILE

Keys: relabel_share (CPU-seconds of `shards build` with other annotations, over the first build), annotate_share
(the same of `shards annotate`), num_shards, build_cpu_s. 40 videos of 8 s; `--quick`: 12 of 3 s.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np

from re2tal.data.building.annotate import annotate
from re2tal.data.building.annotations import Annotations
from re2tal.data.building.build import BuildConfig, build_shards
from re2tal.data.contract.manifest import Encoding, FramesPerSecond
from re2tal.data.contract.shards import open_shards
from re2tal.structures import Action, VideoRecord

WIDTH, HEIGHT, RATE = 640, 360, 25


def write_video(path: Path, *, seconds: int, seed: int) -> None:
    """Moving noise, as large as a small video of the web."""
    rng = np.random.default_rng(seed)
    picture = rng.integers(0, 255, (HEIGHT // 8, WIDTH // 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=RATE, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for number in range(seconds * RATE):
            moved = np.roll(picture, (2 * number, 5 * number), (0, 1))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(moved, format="rgb24")))
        container.mux(stream.encode(None))


def listed(count: int, *, seconds: int, shift: float, label: str = "x") -> Annotations:
    """One action for each video, `shift` seconds later."""
    actions = (Action(0.5 + shift, 1.5 + shift, label),)
    records = tuple(VideoRecord(f"v{n}", "training", float(seconds), actions) for n in range(count))
    return Annotations({"training": records}, (label,), num_ambiguous=0, num_clipped=0, num_dropped=0)


def cpu_seconds(work: Callable[[], object]) -> float:
    """Of this process and of those it starts."""
    before = _used()
    work()
    return _used() - before


def _used() -> float:
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def measure(*, quick: bool) -> dict[str, float]:
    """The keys above."""
    count, seconds = (12, 3) if quick else (40, 8)
    config = BuildConfig(
        dataset="own",
        encoding=Encoding(FramesPerSecond(15.0)),
        workers=len(os.sched_getaffinity(0)),
        shard_bytes=4_000_000,
    )
    with tempfile.TemporaryDirectory() as place:
        videos, out = Path(place, "videos"), Path(place, "out")
        videos.mkdir()
        for number in range(count):
            write_video(videos / f"v{number}.mp4", seconds=seconds, seed=number)

        def build(annotations: Annotations) -> float:
            return cpu_seconds(
                lambda: build_shards(annotations, videos=videos, out=out, subset="training", config=config)
            )

        first = build(listed(count, seconds=seconds, shift=0.0))
        num_shards = len(open_shards(out / "training").manifest.shards)
        again = build(listed(count, seconds=seconds, shift=0.1, label="y"))
        annotated = cpu_seconds(lambda: annotate(out, listed(count, seconds=seconds, shift=0.2)))
    return {
        "relabel_share": again / first,
        "annotate_share": annotated / first,
        "num_shards": num_shards,
        "build_cpu_s": first,
    }


def main() -> None:
    """Measure, print, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    figures = measure(quick=options.quick)
    for key, value in figures.items():
        print(f"{key:16} {value:.5g}")
    options.json.write_text(json.dumps(figures))


if __name__ == "__main__":
    main()
