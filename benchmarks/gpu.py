"""What a machine's first GPU has to show: every claim of this project about CUDA, in one command, the weightiest first.

    python benchmarks/gpu.py [--device cuda] [--minutes 9] [--part NAME ...] [--json FILE]

Every part runs in a process of its own and writes row by row. A crash, an error, a form that does not fit, or the end
of the time costs only what was not measured yet. FILE is written again after each part. With `--device cpu` every part
runs in small, to try the script itself; ZeRO then goes through gloo.

    machine     versions, device, what DeepSpeed finds
    exactness   each family of backbones, float32 and bfloat16, on a grid: `drift` of the first state that backward
                rebuilds (0 is the same bits), and gradients against a run that saves everything. Whole branches give
                the same bits; pieces add up their weights' gradients in another order. `noise` is how far the saving
                run is from itself when it is run twice
    training    two optimizer steps of recipes under ZeRO 2 and 3, through the launcher
    memory      peaks and step times of each form of a backbone (see forms.py), at the recipes' sizes
    longest     the longest video at 224 x 224 that trains in 11 GB, and in the whole device: predicted, then tried
    planner     the planner's prediction against the measured peak
    offload     states in host memory: time of a step and peak against the same step without
    loader      clips per second of the data path
    coupling    the last linear layer that adds straight into the state
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from gpu_parts import PARTS, Row

from re2tal.strict_json import write_json


def run_part(name: str, device: torch.device, rows: Path) -> None:
    """In the process of the part: a line of JSON for each row, as soon as it is there."""
    with rows.open("a") as file:
        for row in PARTS[name](device):
            file.write(json.dumps(row) + "\n")
            file.flush()
            print(name, json.dumps({key: value for key, value in row.items() if key != "traceback"}), flush=True)


def in_process(name: str, device: torch.device, *, seconds: float) -> Row:
    """The rows of a part, and how it ended."""
    with tempfile.TemporaryDirectory() as folder:
        rows, log = Path(folder) / "rows.jsonl", Path(folder) / "log"
        command = [sys.executable, __file__, "--device", str(device), "--run-part", name, "--rows", str(rows)]
        start = time.perf_counter()
        with log.open("w") as stderr:
            child = subprocess.Popen(command, stderr=stderr, start_new_session=True)
            try:
                ended = {0: "whole"}.get(child.wait(timeout=seconds), f"failed: {child.returncode}")
            except subprocess.TimeoutExpired:
                os.killpg(child.pid, 9)
                child.wait()
                ended = f"cut after {seconds:.0f} s"
        found = [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else []
        part: Row = {"ended": ended, "seconds": round(time.perf_counter() - start, 1), "rows": found}
        return part if ended == "whole" else part | {"log": log.read_text()[-3000:]}


def main() -> None:
    """Runs the parts one after the other, for as long as there is time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--minutes", type=float, default=9.0, help="for all parts together")
    parser.add_argument("--quick", action="store_true", help="the same as --device cpu --minutes 2")
    parser.add_argument("--part", action="append", choices=sorted(PARTS), help="only these; may be repeated")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--run-part", choices=sorted(PARTS), help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run_part:
        run_part(arguments.run_part, arguments.device, arguments.rows)
        return
    device, minutes = (torch.device("cpu"), 2.0) if arguments.quick else (arguments.device, arguments.minutes)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("this torch sees no CUDA device; --device cpu runs every part in small")
    end = time.perf_counter() + 60 * minutes
    results: Row = {}
    names = [name for name in PARTS if name in (arguments.part or PARTS)]
    for name in names:
        left = end - time.perf_counter()
        # Half of what is left at most, so that one part cannot take the time of all that follow.
        limit = left if name == names[-1] else max(left / 2, min(left, 45.0))
        results[name] = in_process(name, device, seconds=limit) if left > 5 else {"ended": "no time left", "rows": []}
        print(f"{name}: {results[name]['ended']}, {len(results[name]['rows'])} rows", flush=True)
        if arguments.json:
            write_json(arguments.json, results)
    failed = [name for name, part in results.items() if part["ended"].startswith("failed")]
    failed += [name for name, part in results.items() if any("failure" in row for row in part["rows"])]
    if failed:
        sys.exit(f"not whole: {', '.join(dict.fromkeys(failed))}")


if __name__ == "__main__":
    main()
