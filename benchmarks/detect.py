"""`re2tal detect` on long videos: memory and time against a short one, and how many times faster than the video plays.

    a video of 1 minute, one of 60 (10 with --quick): the same rate and size, 320 x 240 at 30 frames per second
    each in a process of its own; memory is the peak of it and of its decoder together, as the kernel counts them

The network is the nano Swin of the demo recipe with random weights, which take as long as trained ones, and windows of
64 frames at 8 per second. Claims: peak memory within 10 %, time per minute of video within 20 %, at least 10 times
faster than the video plays on 2 cores. Time per minute is compared without the start of Python and of the decoder.

    python benchmarks/detect.py [--quick] --json FILE
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import av
import numpy as np
import torch

from re2tal.config import build_detector, save_config
from re2tal.recipes import find_recipe
from re2tal.training.export import write_model

WIDTH, HEIGHT, RATE = 320, 240, 30
CLASSES = ("up", "down", "left", "right", "turn", "stay")
MEASURE = """
import json, resource, sys, time
from pathlib import Path
import re2tal
detector = re2tal.load_detector(sys.argv[1], device="cpu", batch_size=4)
detector.detect(sys.argv[2])  # starts what starts once
start, before = time.perf_counter(), time.process_time()
found = detector.detect(sys.argv[3])
seconds = time.perf_counter() - start
kilobytes = sum(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
cpu = time.process_time() - before
print(json.dumps({"seconds": seconds, "own_cpu_seconds": cpu, "peak_mib": kilobytes / 1024, "found": len(found)}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    parser.add_argument("--quick", action="store_true", help="10 minutes in the place of 60")
    options = parser.parse_args()
    minutes = 10 if options.quick else 60
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(Path(folder), minutes)
    for name, value in figures.items():
        print(f"{name:<28} {value}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


def measure(folder: Path, minutes: int) -> dict[str, object]:
    """The figures of the long video and of the short one, and their ratios."""
    write_model_folder(folder / "model")
    minute = write_minute(folder / "short.mp4")
    short = run(folder / "model", minute, minute)
    long = run(folder / "model", minute, repeat(minute, folder / "long.mp4", times=minutes))
    ratios = {
        "peak memory, long / short": round(long["peak_mib"] / short["peak_mib"], 3),
        "time per minute, long / short": round(long["seconds"] / minutes / short["seconds"], 3),
        "times faster than it plays": round(60 * minutes / long["seconds"], 1),
    }
    return {
        "minutes": minutes,
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        **ratios,
        "short": short,
        "long": long,
    }


def write_model_folder(folder: Path) -> None:
    """The demo's detector, untrained."""
    config = find_recipe("demo")
    folder.mkdir()
    save_config(folder / "config.json", config)
    torch.manual_seed(0)
    write_model(folder / "model.safetensors", build_detector(config, CLASSES).state_dict(), classes=CLASSES)


def write_minute(path: Path) -> Path:
    """A minute of a moving square on noise that moves too."""
    generator = np.random.default_rng(0)
    ground = generator.integers(0, 255, (HEIGHT, WIDTH + RATE * 60, 3), dtype=np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=RATE, options={"preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for number in range(RATE * 60):
            picture = ground[:, number // 4 : number // 4 + WIDTH] // 8 + 96
            place = (3 * number) % (WIDTH - 40)
            picture[100:140, place : place + 40] = 255
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")))
        container.mux(stream.encode(None))
    return path


def repeat(once: Path, path: Path, *, times: int) -> Path:
    """The packets of a video, so many times one after the other."""
    with av.open(str(once)) as source:
        stream = source.streams.video[0]
        packets = [
            (bytes(one), one.pts, one.dts, one.is_keyframe, one.time_base) for one in source.demux(stream) if one.size
        ]
        base = packets[0][4]
        span = round(len(packets) / RATE / base)
        with av.open(str(path), "w") as target:
            copy = target.add_stream_from_template(stream)
            for round_ in range(times):
                for content, pts, dts, is_key, _ in packets:
                    packet = av.Packet(content)
                    packet.stream, packet.time_base, packet.is_keyframe = copy, base, is_key
                    packet.pts, packet.dts = pts + round_ * span, dts + round_ * span
                    target.mux(packet)
    return path


def run(model: Path, warm: Path, video: Path) -> dict[str, float]:
    """Seconds, and the peak of memory, of one video in a process of its own."""
    command = [sys.executable, "-c", MEASURE, str(model), str(warm), str(video)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return {name: round(value, 2) for name, value in json.loads(done.stdout.splitlines()[-1]).items()}


if __name__ == "__main__":
    main()
