"""What end-to-end training is worth: the demo recipe with its randomly initialised backbone frozen.

    python benchmarks/frozen_baseline.py [--trained runs/quickstart/summary.json] [--quick] [--json FILE]

Trains the recipe as `launch/quickstart.sh` does, with the same data, ranks and number of steps, but the backbone never
learns. Writes the run's summary to FILE, and prints the ratio of the two average mAPs where the trained run is there.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from re2tal.strict_json import read_json, write_json

REPOSITORY = Path(__file__).resolve().parents[1]


def train_frozen(folder: Path, *, quick: bool) -> dict[str, Any]:
    """Trains in `folder` on two ranks, if there are two GPUs or cores, and returns the summary."""
    ranks = min(2, torch.cuda.device_count() or os.cpu_count() or 1)
    command = ["deepspeed", "--num_accelerators", str(ranks), "launch/train.py", "--recipe", "demo"]
    command += ["--ds", "ds_configs/zero2.json", "--out", str(folder), "--overwrite", "--backbone.frozen"]
    if quick:
        command += ["--training.epochs", "5"]
    threads = os.environ.get("OMP_NUM_THREADS", "1")
    subprocess.run(
        command, cwd=REPOSITORY, check=True, stdout=sys.stderr, env=os.environ | {"OMP_NUM_THREADS": threads}
    )
    return read_json(folder / "summary.json")


def main() -> None:
    """Trains, prints, writes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--trained", type=Path, default=REPOSITORY / "runs/quickstart/summary.json")
    parser.add_argument("--quick", action="store_true", help="5 epochs instead of the recipe's")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        frozen = train_frozen(Path(folder), quick=arguments.quick)
    print(f"frozen backbone: average mAP {frozen['average_map']:.1%} in {frozen['train_seconds']:.0f} s of training")
    if arguments.trained.is_file():
        trained = read_json(arguments.trained)
        ratio = trained["average_map"] / max(frozen["average_map"], 1e-9)
        print(f"trained end to end: {trained['average_map']:.1%}, {ratio:.1f} times as much")
    if arguments.json:
        write_json(arguments.json, frozen)


if __name__ == "__main__":
    main()
