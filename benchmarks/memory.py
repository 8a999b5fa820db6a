"""Peak activation memory and step time: plain, checkpointed per block, reversible, and reversible in pieces.

    python benchmarks/memory.py [--quick] [--device cuda] [--model NAME ...] [--json FILE]

    peak     most bytes alive at once in forward and backward, less parameters and gradients: counted storage by storage
             on the CPU, by the allocator on CUDA
    time     median over the runs, all four forms in turn in each
    growth   what the peak in pieces gains when the stage that it comes from has twice as many blocks
    drift    gradient of the first weight in pieces, against the same network that keeps its activations

Plain and checkpointed networks are not rewired, so they compute another function at the same cost. Float32 throughout.
"""

from __future__ import annotations

import argparse
import copy
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from re2tal.backbones import BackboneConfig, build_backbone
from re2tal.reversible.live_bytes import LiveBytes
from re2tal.rewire import RewiringConfig, residual_branches, rewire
from re2tal.strict_json import write_json


@dataclass(frozen=True)
class Case:
    """One backbone, and the clip that it is measured on."""

    blocks: str
    """The container of blocks that the peak comes from; it is doubled for `growth`."""
    frames: int
    size: int
    chunk_mebibytes: float


CASES = {
    "swin3d_tiny": Case("layers.0.blocks", frames=128, size=112, chunk_mebibytes=8),
}
QUICK = {
    "swin3d_tiny": Case("layers.0.blocks", frames=128, size=56, chunk_mebibytes=16),
}


def network(name: str, case: Case, form: str, *, double: bool = False, recompute: bool = True) -> nn.Module:
    """The same weights in one of FORMS; `double` repeats the blocks of one stage."""
    torch.manual_seed(0)
    backbone = build_backbone(BackboneConfig(name=name, rewired=False))
    if double:
        blocks = backbone.get_submodule(case.blocks)
        assert isinstance(blocks, nn.Sequential | nn.ModuleList)
        blocks.extend(copy.deepcopy(list(blocks)))
    if form == "checkpoint":
        for block in [module for module in backbone.modules() if residual_branches(module)]:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    if form in ("reversible", "in pieces"):
        chunk = case.chunk_mebibytes if form == "in pieces" else None
        rewire(backbone, config=RewiringConfig(chunk_mebibytes=chunk, recompute=recompute))
    return backbone


FORMS = ("plain", "checkpoint", "reversible", "in pieces")


def step_of(backbone: nn.Module, case: Case, device: torch.device) -> Callable[[], None]:
    """A forward and a backward on one clip, into gradients that exist already."""
    backbone.to(device)
    for parameter in backbone.parameters():
        parameter.grad = torch.zeros_like(parameter)
    generator = torch.Generator().manual_seed(1)
    frames = torch.randn(1, 3, case.frames, case.size, case.size, generator=generator).to(device)
    mask = torch.ones(1, case.frames, dtype=torch.bool, device=device)
    return lambda: backbone(frames, mask).values.square().mean().backward()


def peak_bytes(step: Callable[[], None], device: torch.device) -> int:
    """Of one step, beyond what was there before it."""
    gc.collect()
    if device.type == "cuda":
        step()  # libraries take their workspaces with the first step
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with LiveBytes() as live:
        step()
    return live.peak


def seconds(step: Callable[[], None], device: torch.device) -> float:
    """Of one step."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    step()
    synchronize()
    return time.perf_counter() - start


def drift(name: str, case: Case, device: torch.device) -> float:
    """Relative error of the first weight's gradient, which all rebuilt states have gone into."""
    gradients = []
    for recompute in (True, False):
        backbone = network(name, case, "in pieces", recompute=recompute)
        step_of(backbone, case, device)()
        gradients.append(next(p.grad for p in backbone.parameters() if p.grad is not None and p.ndim > 1))
    rebuilt, kept = gradients
    return float((rebuilt - kept).norm() / kept.norm())


def measure(name: str, case: Case, device: torch.device, *, repeats: int) -> dict[str, float]:
    """Prints the table of one backbone, and returns its ratios."""
    steps = {form: step_of(network(name, case, form), case, device) for form in FORMS}
    peaks = {form: peak_bytes(step, device) for form, step in steps.items()}
    rounds = [{form: seconds(step, device) for form, step in steps.items()} for _ in range(repeats)]
    del steps
    doubled = peak_bytes(step_of(network(name, case, "in pieces", double=True), case, device), device)
    print(
        f"\n{name}, 1 clip of {case.frames} frames of {case.size} x {case.size}, pieces of {case.chunk_mebibytes} MiB"
    )
    print(f"{'':12}{'peak MiB':>10}{'x plain':>9}{'x ckpt':>9}{'time x plain':>14}{'x ckpt':>9}")
    for form in FORMS:
        versus = [statistics.median(each[form] / each[base] for each in rounds) for base in ("plain", "checkpoint")]
        print(
            f"{form:12}{peaks[form] / 2**20:10.1f}{peaks[form] / peaks['plain']:9.3f}"
            f"{peaks[form] / peaks['checkpoint']:9.3f}{versus[0]:14.2f}{versus[1]:9.2f}"
        )
    return {
        "vs_plain": peaks["in pieces"] / peaks["plain"],
        "vs_checkpoint": peaks["in pieces"] / peaks["checkpoint"],
        "depth_growth": doubled / peaks["in pieces"] - 1,
        "time_vs_plain": statistics.median(each["in pieces"] / each["plain"] for each in rounds),
        "time_vs_checkpoint": statistics.median(each["in pieces"] / each["checkpoint"] for each in rounds),
        "drift": drift(name, case, device),
    }


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="smaller clips and fewer rounds")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--model", action="append", choices=sorted(CASES), help="only these; may be repeated")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    cases = QUICK if arguments.quick else CASES
    names = [name for name in cases if name in (arguments.model or cases)]
    repeats = 2 if arguments.quick else 5
    results = {name: measure(name, cases[name], arguments.device, repeats=repeats) for name in names}
    for name, ratios in results.items():
        print(f"\n{name}: " + ", ".join(f"{key} {value:.3g}" for key, value in ratios.items()))
    if arguments.json:
        write_json(arguments.json, results)


if __name__ == "__main__":
    main()
