"""What each kind of states costs and how well it is rebuilt: transformer blocks that compute in bfloat16.

    python benchmarks/precision.py [--quick] [--device cuda] [--json FILE]

    state      first state as backward rebuilt it, against what it was in forward: norm of the difference over the norm
    gradient   of the first branch's weights, against the same run with all branches' activations stored
    noise      of plain autograd in bfloat16, against the same network in float32: what there is to be compared with
    time       of forward and backward, over that of float32 states without a grid; median, all kinds in turn

Blocks are pre-norm attention and MLP of 192 channels and 6 heads on 64 tokens, random weights, autocast.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from re2tal.reversible import run_reversibly
from re2tal.strict_json import write_json

CHANNELS, HEADS, TOKENS = 192, 6, 64
DEPTHS = (12, 24, 48)
KINDS: dict[str, dict[str, Any]] = {
    "float32, grid 2**-14": {},
    "int32, step 2**-16": {"states": "int32"},
    "float32": {"grid": None},
}


class Attention(nn.Module):
    """(B, T, C) -> (B, T, C)"""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = (
            nn.LayerNorm(CHANNELS),
            _linear(CHANNELS, 3 * CHANNELS),
            _linear(CHANNELS, CHANNELS),
        )

    def forward(self, x: Tensor) -> Tensor:
        """The branch alone."""
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """(B, T, C) -> (B, T, C)"""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = (
            nn.LayerNorm(CHANNELS),
            _linear(CHANNELS, 4 * CHANNELS),
            _linear(4 * CHANNELS, CHANNELS),
        )

    def forward(self, x: Tensor) -> Tensor:
        """The branch alone."""
        return self.down(F.gelu(self.up(self.norm(x))))


def _linear(inputs: int, outputs: int) -> nn.Linear:
    linear = nn.Linear(inputs, outputs)
    nn.init.normal_(linear.weight, std=inputs**-0.5)
    return linear


def step(
    branches: nn.ModuleList, x: Tensor, *, narrow: bool = True, recompute: bool = True, **options: Any
) -> tuple[Tensor, list[Tensor]]:
    """The gradient of the first branch's first weight, and what that branch was given in forward and in backward."""
    seen: list[Tensor] = []
    handle = branches[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().clone()))
    branches.zero_grad()
    with torch.autocast(x.device.type, torch.bfloat16, enabled=narrow):
        output = run_reversibly(list(branches), x, recompute=recompute, owner=branches, **options)
    output.square().mean().backward()
    handle.remove()
    return branches[0].qkv.weight.grad, seen


def relative(found: Tensor, wanted: Tensor) -> float:
    """Norm of the difference over the norm."""
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def measure(depth: int, *, repeats: int, device: torch.device) -> dict[str, dict[str, float]]:
    """Every kind of states at one depth."""
    torch.manual_seed(0)
    branches = nn.ModuleList(kind() for _ in range(depth) for kind in (Attention, Mlp)).to(device)
    x = torch.randn(4, TOKENS, CHANNELS, generator=torch.Generator().manual_seed(1)).to(device)
    run = partial(step, branches, x)
    noise = relative(run(recompute=False, grid=None)[0], run(recompute=False, narrow=False)[0])
    results: dict[str, dict[str, float]] = {}
    for name, options in KINDS.items():
        # The first branch keeps its input, so nothing is inverted.
        wanted, _ = run(saved_branches=len(branches) - 1, **options)
        found, (forward, backward) = run(**options)
        results[name] = {"state": relative(backward, forward), "gradient": relative(found, wanted), "noise": noise}
    times: dict[str, list[float]] = {name: [] for name in KINDS}
    for _ in range(repeats):
        for name, options in KINDS.items():
            times[name].append(_seconds(partial(run, **options), device))
    base = times["float32"]
    for name, own in times.items():
        results[name]["time"] = statistics.median(one / other for one, other in zip(own, base, strict=True))
    return results


def _seconds(function: Callable[[], object], device: torch.device) -> float:
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - start


def main() -> None:
    """Prints the table, and writes it as {blocks: {kind of states: figures}}."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="12 blocks only, few repeats")
    parser.add_argument("--repeats", type=int, help="timed steps of each kind; 15, or 3 with --quick")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    repeats = options.repeats or (3 if options.quick else 15)
    figures = {}
    print("| blocks | states | rebuilt first state | first gradient | bfloat16's own noise | time |")
    print("| ---: | --- | ---: | ---: | ---: | ---: |")
    for depth in DEPTHS[:1] if options.quick else DEPTHS:
        figures[str(depth)] = measure(depth, repeats=repeats, device=torch.device(options.device))
        for name, row in figures[str(depth)].items():
            errors = f"{row['state']:.1e} | {row['gradient']:.1e} | {row['noise']:.1e}"
            print(f"| {depth} | {name} | {errors} | {row['time']:.2f} |", flush=True)
    if options.json:
        write_json(options.json, figures)


if __name__ == "__main__":
    main()
