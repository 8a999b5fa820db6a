"""What it buys to let a branch's last linear layer add straight into the state, in one matrix product with beta = 1.

    plain    x[i-1] += F.linear(hidden, W, b)            the branch's output is written, read again, and freed
    fused    x[i-1].addmm_(hidden, W^T).add_(b)          it never exists; the inverse has alpha = -1

    python benchmarks/coupling.py [--quick] [--device cuda] [--json FILE]

Measured is one reversible step of the MLP branch of a transformer (norm, linear, GELU, linear): its forward without a
graph, then the rebuild, the inverse and the backward. The engine does not do this: docs/experiments.md says why. Fused
and plain steps run in turn; time is the median of their ratios, in the processor's time on a CPU. Memory is the most
that is alive beyond two states, their gradients and the parameters' gradients, in states.
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
from torch.autograd.graph import get_gradient_edge

from re2tal.reversible.live_bytes import LiveBytes
from re2tal.strict_json import write_json

# Tokens and channels: the four stages of Video Swin-T, and ViT-B.
CASES = {"swin, stage 1": (16384, 96), "swin, stage 2": (4096, 192), "swin, stage 3": (2048, 384), "vit-b": (1568, 768)}
QUICK = {"swin, stage 1": (4096, 96), "swin, stage 3": (1024, 384)}


class AddLinear(torch.autograd.Function):
    """Adds `sign` times a linear map of `hidden` to `state` in place; returns zeros that take its gradient."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor, state: Tensor, sign: int) -> Tensor:
        """The sum, in the buffer of `state`."""
        state.addmm_(hidden, weight.t(), alpha=sign).add_(bias, alpha=sign)
        ctx.save_for_backward(hidden, weight)
        return hidden.new_zeros(()).expand(state.shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        """That of the linear map, whatever its sign: the gradient is the update's, not the state's."""
        hidden, weight = ctx.saved_tensors
        return gradient @ weight, gradient.t() @ hidden, gradient.sum(0), None, None


class Branch(nn.Module):
    """(tokens, C) -> the same, or `inner` alone: all but the last linear layer."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm, self.fc1 = nn.LayerNorm(channels), nn.Linear(channels, 4 * channels)
        self.fc2 = nn.Linear(4 * channels, channels)

    def inner(self, x: Tensor) -> Tensor:
        """(tokens, C) -> (tokens, 4 C)."""
        return F.gelu(self.fc1(self.norm(x)))


def plain_step(branch: Branch, current: Tensor, other: Tensor, gradient: Tensor) -> Tensor:
    """Forward, then rebuild and backward; `other` is x[i-1] before, between and after."""
    with torch.no_grad():
        other.add_(branch.fc2(branch.inner(current)))
    point = current.detach().requires_grad_()
    update = branch.fc2(branch.inner(point))
    other.sub_(update.detach())
    edge = get_gradient_edge(update)
    del update
    torch.autograd.backward((edge,), (gradient,))
    assert point.grad is not None
    return point.grad


def fused_step(branch: Branch, current: Tensor, other: Tensor, gradient: Tensor) -> Tensor:
    """The same."""
    last = branch.fc2
    with torch.no_grad():
        other.addmm_(branch.inner(current), last.weight.t()).add_(last.bias)
    point = current.detach().requires_grad_()
    update = AddLinear.apply(branch.inner(point), last.weight, last.bias, other, -1)
    torch.autograd.backward((get_gradient_edge(update),), (gradient,))
    assert point.grad is not None
    return point.grad


STEPS = {"plain": plain_step, "fused": fused_step}


def compare(num_tokens: int, channels: int, *, rounds: int, device: torch.device) -> dict[str, float]:
    """Ratios of plain to fused, and the memory of both."""
    torch.manual_seed(0)
    branch = Branch(channels).to(device)
    current, other, gradient = (torch.randn(num_tokens, channels, device=device) for _ in range(3))
    for parameter in branch.parameters():
        parameter.grad = torch.zeros_like(parameter)
    calls = {name: partial(step, branch, current, other, gradient) for name, step in STEPS.items()}
    expected, found = calls["plain"](), calls["fused"]()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    pairs = [{name: seconds(call, device) for name, call in calls.items()} for _ in range(rounds)]
    state_bytes = current.numel() * current.element_size()
    return {
        "plain_ms": 1e3 * statistics.median(pair["plain"] for pair in pairs),
        "time_fused_to_plain": statistics.median(pair["fused"] / pair["plain"] for pair in pairs),
        **{f"states_{name}": peak_bytes(call, device) / state_bytes for name, call in calls.items()},
    }


def seconds(call: Callable[[], Tensor], device: torch.device) -> float:
    """Of one call."""
    clock, wait = time.process_time, lambda: None
    if device.type == "cuda":
        clock, wait = time.perf_counter, torch.cuda.synchronize
    wait()
    start = clock()
    call()
    wait()
    return clock() - start


def peak_bytes(call: Callable[[], Tensor], device: torch.device) -> int:
    """Most bytes alive in one call, of what it makes."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    with LiveBytes() as live:
        call()
    return live.peak


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--device", type=torch.device, default="cpu")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = {
        name: compare(*case, rounds=5 if arguments.quick else 11, device=arguments.device)
        for name, case in (QUICK if arguments.quick else CASES).items()
    }
    print(f"{'case':16}{'plain ms':>10}{'fused / plain':>16}{'states, plain':>16}{'states, fused':>16}")
    for name, row in rows.items():
        print(f"{name:16}{row['plain_ms']:10.1f}{row['time_fused_to_plain']:16.3f}", end="")
        print(f"{row['states_plain']:16.2f}{row['states_fused']:16.2f}")
    if arguments.json:
        write_json(arguments.json, rows)


if __name__ == "__main__":
    main()
