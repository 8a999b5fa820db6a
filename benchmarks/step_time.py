"""Time of a training step of a backbone in every form (forms.py), and what exact rebuilding costs.

    python benchmarks/step_time.py [--quick] [--device cuda] [--model NAME ...] [--json FILE]

Runs are paired: all forms in turn, every second time in the opposite order, and a ratio is the median of the ratios
within runs. Inexact forms have plain float32 states, where the others have the default: a grid that makes rebuilding
exact under bfloat16 autocast, and in float32 for branches with kinks (SlowFast; other families have none to compare).
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace
from pathlib import Path

import torch
from forms import Network, Step, median_ratio, rounds
from memory import MODELS, TIMED

from re2tal.strict_json import write_json


def measure(name: str, device: torch.device, *, quick: bool, num: int, mebibytes: float | None) -> dict[str, float]:
    """Prints seconds and ratios of one backbone, and returns the ratios. `mebibytes` of a piece may be given."""
    model, network = MODELS[name], Network(name, device=device)
    case = model.quick if quick else model.real if device.type == "cuda" else model.case
    case = replace(case, chunk_mebibytes=mebibytes or case.chunk_mebibytes)
    steps: dict[str, Step | None] = {form: network.step(form, case) for form in TIMED}
    if name.startswith("slowfast"):
        steps |= {"inexact": network.step("reversible", case, grid=None)}
    steps |= {"plain, bf16": network.step("plain", case, autocast=True)}
    steps |= {"exact, bf16": network.step("in pieces", case, autocast=True)}
    steps |= {"inexact, bf16": network.step("in pieces", case, autocast=True, grid=None)}
    seconds = list(rounds({form: step for form, step in steps.items() if step is not None}, device, num=num))
    ratios = {
        "checkpoint / plain": median_ratio(seconds, "checkpoint", "plain"),
        "reversible / plain": median_ratio(seconds, "reversible", "plain"),
        "reversible / checkpoint": median_ratio(seconds, "reversible", "checkpoint"),
        "in pieces / plain": median_ratio(seconds, "in pieces", "plain"),
        "in pieces / checkpoint": median_ratio(seconds, "in pieces", "checkpoint"),
        "exact / inexact, bf16": median_ratio(seconds, "exact, bf16", "inexact, bf16"),
        "exact / plain, bf16": median_ratio(seconds, "exact, bf16", "plain, bf16"),
    }
    if "inexact" in steps:
        ratios |= {"reversible / inexact": median_ratio(seconds, "reversible", "inexact")}
    print(f"\n{name}, {case}, {num} runs", flush=True)
    for form in steps:
        print(f"{form:26}{statistics.median(each[form] for each in seconds):8.2f} s")
    for name, ratio in ratios.items():
        print(f"{name:26}{ratio:8.2f}", flush=True)
    return ratios


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small videos, 3 runs")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--model", action="append", choices=sorted(MODELS), help="only these; may be repeated")
    parser.add_argument("--runs", type=int, help="how many runs of all forms")
    parser.add_argument("--mebibytes", type=float, help="of a piece; by default what suits the video")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    num = arguments.runs or (3 if arguments.quick else 7)
    names = [name for name in MODELS if name in (arguments.model or MODELS)]
    results = {
        name: measure(name, arguments.device, quick=arguments.quick, num=num, mebibytes=arguments.mebibytes)
        for name in names
    }
    if arguments.json:
        write_json(arguments.json, results)


if __name__ == "__main__":
    main()
