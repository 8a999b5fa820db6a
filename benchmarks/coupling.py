"""What fusing the kernels of the coupling buys: rounding with adding, and a branch's last linear layer with adding.

    python benchmarks/coupling.py [--quick] [--device cuda] [--json FILE]

Forms run in turn; time is the median of their ratios, in the processor's time on a CPU.

Rounding. One step, x[i-1] += round(F_i(x[i])), or its inverse, which costs the same. Passes are what goes through
memory, in float32 states: 7 where each kernel makes one, as bytes from bfloat16 updates 8.5.

    apart       update + c; - c; x[i-1] += that          a converted copy first, where the update is narrow
    quantize    torch.fake_quantize_per_tensor_affine    rounds in one kernel; but makes numbers of NaN and infinity
    fused       what a run does: `coupling.add_rounded`  3 float32 passes, 2.5 from bfloat16, no temporary
    sum         x[i-1] += update, with no rounding       the least that is possible; not exact

Last linear layer. The engine does not do this: docs/experiments.md says why. Measured is one reversible step of the MLP
branch of a transformer (norm, linear, GELU, linear): its forward without a graph, then the rebuild, the inverse and the
backward. Memory is the most that is alive beyond two states, their gradients and the parameters' gradients, in states.

    plain    x[i-1] += F.linear(hidden, W, b)            the branch's output is written, read again, and freed
    fused    x[i-1].addmm_(hidden, W^T).add_(b)          it never exists; the inverse has alpha = -1
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
from re2tal.reversible.precision import GRID_STEP, StateFormat
from re2tal.strict_json import write_json

# Tokens and channels: the four stages of Video Swin-T, and ViT-B.
CASES = {"swin, stage 1": (16384, 96), "swin, stage 2": (4096, 192), "swin, stage 3": (2048, 384), "vit-b": (1568, 768)}
QUICK = {"swin, stage 1": (4096, 96), "swin, stage 3": (1024, 384)}


ROUNDING = {"6 MiB": 2**20 * 3 // 2, "64 MiB": 2**24, "256 MiB": 2**26}
"""Numbers of a state: one of Swin's stages and a piece, about."""
QUICK_ROUNDING = {"1 MiB": 2**18, "16 MiB": 2**22}


def rounding_forms(device: torch.device) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """By name: x[i-1], F_i(x[i]) -> x[i+1], in the buffer of x[i-1]."""
    precision = StateFormat.of(torch.ones(1, device=device), GRID_STEP)

    def quantize(state: Tensor, update: Tensor) -> Tensor:
        rounded = torch.fake_quantize_per_tensor_affine(update.float(), GRID_STEP, 0, -(2**31), 2**31 - 1)
        return state.add_(rounded)

    return {
        "apart": lambda state, update: state.add_(precision.round(update)),
        "quantize": quantize,
        "fused": precision.add,
        "sum": torch.Tensor.add_,
    }


@torch.no_grad()
def compare_rounding(num: int, dtype: torch.dtype, *, rounds: int, device: torch.device) -> dict[str, float]:
    """Milliseconds of the first form, and of the others the ratio to it."""
    torch.manual_seed(0)
    state = torch.randint(-(2**20), 2**20, (num,), device=device) * GRID_STEP
    update = torch.randn(num, device=device).to(dtype)
    forms = rounding_forms(device)
    for name in ("quantize", "fused"):
        assert torch.equal(forms[name](state.clone(), update), forms["apart"](state.clone(), update)), name

    def warm_seconds(form: Callable[[Tensor, Tensor], Tensor]) -> float:
        form(state, update)  # the form before may have given its memory back to the system
        return seconds(partial(form, state, update), device)

    pairs = [{name: warm_seconds(form) for name, form in forms.items()} for _ in range(rounds)]
    ratios = {name: statistics.median(pair[name] / pair["apart"] for pair in pairs) for name in forms}
    return {"apart_ms": 1e3 * statistics.median(pair["apart"] for pair in pairs), **ratios}


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
    rounding = {
        (name, str(dtype).removeprefix("torch.")): compare_rounding(num, dtype, rounds=15, device=arguments.device)
        for name, num in (QUICK_ROUNDING if arguments.quick else ROUNDING).items()
        for dtype in (torch.float32, torch.bfloat16)
    }
    print(f"{'state':16}{'update':10}{'apart, ms':>12}{'quantize':>12}{'fused':>12}{'sum':>12}   (x apart)")
    for (name, dtype), row in rounding.items():
        print(
            f"{name:16}{dtype:10}{row['apart_ms']:12.2f}{row['quantize']:12.2f}{row['fused']:12.2f}{row['sum']:12.2f}"
        )
    rows = {
        name: compare(*case, rounds=5 if arguments.quick else 11, device=arguments.device)
        for name, case in (QUICK if arguments.quick else CASES).items()
    }
    print(f"{'case':16}{'plain ms':>10}{'fused / plain':>16}{'states, plain':>16}{'states, fused':>16}")
    for name, row in rows.items():
        print(f"{name:16}{row['plain_ms']:10.1f}{row['time_fused_to_plain']:16.3f}", end="")
        print(f"{row['states_plain']:16.2f}{row['states_fused']:16.2f}")
    if arguments.json:
        rounded = {" of ".join(reversed(key)): row for key, row in rounding.items()}
        write_json(arguments.json, {"rounding": rounded, "last linear layer": rows})


if __name__ == "__main__":
    main()
