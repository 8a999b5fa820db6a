"""What planning for half of plain's memory costs: predicted against measured peak, and time against plain training.

python benchmarks/planner.py [--quick] [--device cuda] [--model NAME ...] [--json FILE]

budget   parameters, gradients and optimizer, and half of what the peak of a step in which the backbone's stages store
         everything has besides: the batch and all activations
peak     of a forward and backward of the detector under the plan: predicted on fake tensors, and measured
time     median over rounds of the planned step over the plain one (not rewired), taken in turn in each round
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from re2tal.backbones import BackboneConfig
from re2tal.config import RunConfig, build_detector
from re2tal.data.streaming.windows import Slide
from re2tal.planning.choice import plan_step
from re2tal.planning.step_plan import GIGABYTE
from re2tal.recipes.presets import demo
from re2tal.reversible.live_bytes import LiveBytes
from re2tal.strict_json import write_json
from re2tal.training.frames import prepare_frames

# Frames and size of one clip.
CASES = {"swin3d_tiny": (64, 112), "videomae_base": (64, 112)}
QUICK = {"swin3d_nano": (64, 64), "videomae_nano": (256, 32)}


def run_of(name: str, num_frames: int, size: int, *, budget_gb: float | None, **backbone) -> RunConfig:
    run = demo()
    clips = replace(run.data.clips, windowing=Slide(num_frames=num_frames, frames_per_second=8.0), size=size)
    return replace(
        run,
        num_steps=16,
        data=replace(run.data, clips=clips),
        backbone=BackboneConfig(name=name, **backbone),
        localizer=replace(run.localizer, max_num_steps=16),
        engine=replace(run.engine, batch_size=1, memory_budget_gb=budget_gb),
    )


def step_of(detector: nn.Module, run: RunConfig, device: torch.device) -> Callable[[], None]:
    """A forward and a backward from uint8 frames, into new gradients."""
    num_frames, size = run.data.clips.windowing.num_frames, run.data.clips.size
    frames = torch.zeros(1, 3, num_frames, size, size, dtype=torch.uint8, device=device)
    mask = torch.ones(1, num_frames, dtype=torch.bool, device=device)
    strength = run.data.clips.colour_jitter

    def step() -> None:
        detector.zero_grad()
        colours = torch.Generator()
        outputs = detector(prepare_frames(frames, strength=strength, generator=colours, dtype=torch.float32), mask)
        torch.stack([leaf.square().sum() for leaf in tree_leaves(outputs) if leaf.requires_grad]).sum().backward()

    return step


def peak_bytes(step: Callable[[], None], detector: nn.Module, device: torch.device) -> int:
    """Of one step, beyond the weights."""
    step()
    detector.zero_grad()
    gc.collect()
    if device.type != "cpu":
        module = torch.get_device_module(device)
        module.reset_peak_memory_stats()
        before = module.memory_allocated()
        step()
        return module.max_memory_allocated() - before
    with LiveBytes() as live:
        step()
    return live.peak


def seconds(step: Callable[[], None], device: torch.device) -> float:
    synchronize = torch.get_device_module(device).synchronize if device.type != "cpu" else lambda: None
    synchronize()
    start = time.perf_counter()
    step()
    synchronize()
    return time.perf_counter() - start


def measure(name: str, num_frames: int, size: int, ds: Path, device: torch.device, *, repeats: int) -> dict:
    def planned(run: RunConfig):
        return plan_step(run, ds, world_size=1, num_classes=4, device=device)

    everything = planned(run_of(name, num_frames, size, budget_gb=None, recompute=False)).memory
    standing = sum(everything.parts.get(part, 0) for part in ("parameters", "gradients", "optimizer", "moving average"))
    run = run_of(name, num_frames, size, budget_gb=(standing + (everything.peak - standing) / 2) / GIGABYTE)
    plan = planned(run)
    print(f"\n{name}, 1 clip of {num_frames} frames of {size} x {size}\n{plan}")
    classes = [f"class {number}" for number in range(4)]
    plain_run = run_of(name, num_frames, size, budget_gb=None, rewired=False)
    plain, rewired = (build_detector(one, classes).to(device) for one in (plain_run, run))
    plan.apply(rewired)
    steps = {"plain": step_of(plain, run, device), "planned": step_of(rewired, run, device)}
    peaks = {
        form: peak_bytes(step, net, device) for (form, step), net in zip(steps.items(), (plain, rewired), strict=True)
    }
    rounds = [{form: seconds(step, device) for form, step in steps.items()} for _ in range(repeats)]
    in_step = max(size for phase, size in plan.memory.phases.items() if phase != "the optimizer steps")
    found = {
        "budget": plan.budget,
        "planned_peak": plan.memory.peak,
        "predicted_step": in_step - standing,
        "measured_step": peaks["planned"],
        "step_vs_plain": peaks["planned"] / peaks["plain"],
        "time_vs_plain": statistics.median(one["planned"] / one["plain"] for one in rounds),
    }
    print("  ".join(f"{key} {value:.4g}" for key, value in found.items()))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="smaller clips and fewer rounds")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--model", action="append", help="only these; may be repeated")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    cases = QUICK if arguments.quick else CASES
    with tempfile.TemporaryDirectory() as folder:
        ds = Path(folder) / "ds.json"
        ds.write_text(json.dumps({"zero_optimization": {"stage": 0}}))
        results = {
            name: measure(name, *case, ds, arguments.device, repeats=3 if arguments.quick else 7)
            for name, case in cases.items()
            if name in (arguments.model or cases)
        }
    if arguments.json:
        write_json(arguments.json, results)


if __name__ == "__main__":
    main()
