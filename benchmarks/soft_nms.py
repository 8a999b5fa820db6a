"""How long suppression takes on one core: soft-NMS of many segments in several classes, in one, and with voting.

Prints the median time by the clock and the median processor time, which others on the machine disturb less.

python benchmarks/soft_nms.py [--quick] [--json FILE]
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from re2tal.evaluation.suppression import SuppressionConfig, suppress
from re2tal.structures import Detections

DURATION_SECONDS = 600.0
# Mean length in seconds: short segments hardly overlap and all are picked, but fall into small clusters; long ones are
# one cluster.
LENGTHS = {"short": 0.6, "long": 20.0}


def synthetic_detections(num: int, *, num_classes: int, mean_length: float) -> Detections:
    generator = torch.Generator().manual_seed(0)
    centre = DURATION_SECONDS * torch.rand(num, generator=generator)
    length = -mean_length * torch.rand(num, generator=generator).log()
    scores = 0.002 + 0.998 * torch.rand(num, generator=generator)
    labels = torch.randint(num_classes, (num,), generator=generator)
    return Detections(torch.stack([centre - length / 2, centre + length / 2], dim=1), scores, labels)


def median_ms(detections: Detections, config: SuppressionConfig, *, repeats: int) -> dict[str, float]:
    clocks = {"wall_ms": time.perf_counter, "cpu_ms": time.process_time}
    times: dict[str, list[float]] = {name: [] for name in clocks}
    suppress(detections, config)
    for _ in range(repeats):
        before = {name: clock() for name, clock in clocks.items()}
        suppress(detections, config)
        for name, clock in clocks.items():
            times[name].append(1e3 * (clock() - before[name]))
    return {name: statistics.median(of_clock) for name, of_clock in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    repeats = 5 if arguments.quick else 31

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
            figures[f"{what}, {name} segments"] = median_ms(detections, config, repeats=repeats if num < 10_000 else 3)
    print(f"{'':55s} {'wall':>9s} {'cpu':>9s}")
    for what, times in figures.items():
        print(f"{what:55s} {times['wall_ms']:9.2f} {times['cpu_ms']:9.2f} ms")
    for name in LENGTHS:
        one, many = (figures[f"2,000 in {count}, {name} segments"]["cpu_ms"] for count in ("1 class", "20 classes"))
        print(f"{f'1 class against 20, {name} segments':55s} {'':9s} {one / many:9.2f} times")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
