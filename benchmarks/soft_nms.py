"""How long suppression takes on one core: soft-NMS of many segments in several classes, in one, and with voting.

Prints the median time by the clock and the median processor time, which others on the machine disturb less. Where g++
is installed, the plain quadratic loop in C++ runs on the same segments, class by class: what compiled extensions do.

    python benchmarks/soft_nms.py [--quick] [--json FILE]
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import ctypes
import json
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from re2tal.evaluation.suppression import SuppressionConfig, suppress
from re2tal.structures import Detections

DURATION_SECONDS = 600.0
# Mean length in seconds. In one class of 2,000 a segment overlaps with 4, 130 and 370 others, and nearly all, a half
# and a third of them are picked.
LENGTHS = {"short": 0.6, "long": 20.0, "longest": 60.0}

QUADRATIC = """
#include <algorithm>
#include <cmath>
extern "C" void suppress(float* s, float* e, float* score, float* length, long n, bool linear, float scale, float low) {
  for (long i = 0; i < n; i++) {
    long best = std::max_element(score + i, score + n) - score;
    for (float* x : {s, e, score, length}) std::swap(x[i], x[best]);
    for (long j = i + 1; j < n;) {
      float overlap = std::max(0.f, std::min(e[i], e[j]) - std::max(s[i], s[j]));
      float iou = overlap / (length[i] + length[j] - overlap);
      score[j] *= linear ? (iou >= scale ? 1 - iou : 1.f) : std::exp(-iou * iou / scale);
      if (score[j] >= low) { j++; continue; }
      n--;
      for (float* x : {s, e, score, length}) x[j] = x[n];
    }
  }
}
"""


def synthetic_detections(num: int, *, num_classes: int, mean_length: float) -> Detections:
    generator = torch.Generator().manual_seed(0)
    centre = DURATION_SECONDS * torch.rand(num, generator=generator)
    length = -mean_length * torch.rand(num, generator=generator).log()
    scores = 0.002 + 0.998 * torch.rand(num, generator=generator)
    labels = torch.randint(num_classes, (num,), generator=generator)
    return Detections(torch.stack([centre - length / 2, centre + length / 2], dim=1), scores, labels)


def compiled_suppression(folder: Path) -> ctypes.CDLL | None:
    if shutil.which("g++") is None:
        return None
    source, library = folder / "quadratic.cpp", folder / "quadratic.so"
    source.write_text(QUADRATIC)
    subprocess.run(["g++", "-O3", "-shared", "-fPIC", source, "-o", library], check=True)
    return ctypes.CDLL(str(library))


def suppress_compiled(library: ctypes.CDLL, detections: Detections, config: SuppressionConfig) -> None:
    """Soft-NMS of each class; the results are dropped."""
    groups = detections.labels.numpy() if config.per_class else np.zeros(len(detections.labels))
    linear = config.method == "linear"
    scale = ctypes.c_float(config.iou_threshold if linear else config.sigma)
    for group in np.unique(groups):
        chosen = groups == group
        starts, ends = (x.copy() for x in detections.segments.numpy()[chosen].T)
        columns = starts, ends, detections.scores.numpy()[chosen].copy(), ends - starts + np.float32(1e-6)
        pointers = [x.ctypes.data_as(ctypes.POINTER(ctypes.c_float)) for x in columns]
        library.suppress(*pointers, ctypes.c_long(chosen.sum()), linear, scale, ctypes.c_float(config.min_score))


def median_ms(job: Callable[[], object], *, repeats: int) -> dict[str, float]:
    clocks = {"wall_ms": time.perf_counter, "cpu_ms": time.process_time}
    times: dict[str, list[float]] = {name: [] for name in clocks}
    job()
    for _ in range(repeats):
        before = {name: clock() for name, clock in clocks.items()}
        job()
        for name, clock in clocks.items():
            times[name].append(1e3 * (clock() - before[name]))
    return {name: statistics.median(of_clock) for name, of_clock in times.items()}


def measure(library: ctypes.CDLL | None, *, repeats: int) -> dict[str, dict[str, float]]:
    per_class, agnostic = SuppressionConfig(), SuppressionConfig(per_class=False)
    voting = SuppressionConfig(per_class=False, voting_threshold=0.9, max_per_video=100)
    linear = SuppressionConfig(method="linear")
    figures: dict[str, dict[str, float]] = {}
    for name, mean_length in LENGTHS.items():
        for num, num_classes, config, what in (
            (2000, 20, per_class, "2,000 in 20 classes"),
            (2000, 1, agnostic, "2,000 in 1 class"),
            (2000, 1, voting, "2,000 in 1 class, best 100, voting"),
            (2000, 20, linear, "2,000 in 20 classes, linear"),
            (2000, 1, linear, "2,000 in 1 class, linear"),
            (40_000, 20, per_class, "40,000 in 20 classes"),
        ):
            detections = synthetic_detections(num, num_classes=num_classes, mean_length=mean_length)
            times = repeats if num < 10_000 else 3
            row = median_ms(lambda d=detections, c=config: suppress(d, c), repeats=times)
            if library is not None and config.voting_threshold is None:
                plain = median_ms(lambda d=detections, c=config: suppress_compiled(library, d, c), repeats=times)
                row["compiled_cpu_ms"] = plain["cpu_ms"]
            figures[f"{what}, {name} segments"] = row
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    repeats = 5 if arguments.quick else 31
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(compiled_suppression(Path(folder)), repeats=repeats)
    print(f"{'':55s} {'wall':>9s} {'cpu':>9s} {'C++, cpu':>9s}")
    for what, times in figures.items():
        compiled = f"{times['compiled_cpu_ms']:9.2f}" if "compiled_cpu_ms" in times else f"{'-':>9s}"
        print(f"{what:55s} {times['wall_ms']:9.2f} {times['cpu_ms']:9.2f} {compiled} ms")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
