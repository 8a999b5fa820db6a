"""What Video Swin's attention with a learned bias costs, against PyTorch's own with the same gradients.

    PyTorch   F.scaled_dot_product_attention with a bias that wants a gradient: on a CPU its plain products, which write
              and keep the weights of all windows; on CUDA the memory-efficient kernel
    ours      `biased_attention.attend`: on a CPU the flash kernel forwards, groups of windows backwards; on CUDA that
              kernel too

    python benchmarks/attention.py [--quick] [--device cuda] [--json FILE]

Forward without a gradient, and forward and backward, in turn; medians of ratios of the processor's time (wall time on
CUDA). Memory is the most that is alive beyond queries, keys, values, the bias and their gradients, in states.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from coupling import peak_bytes, seconds
from torch import Tensor

from re2tal.backbones.swin3d.biased_attention import attend
from re2tal.strict_json import write_json

# Windows of 8 x 7 x 7 tokens, and heads of 32 channels: stages of Video Swin-T.
CASES = {"stage 1": (128, 3), "stage 2": (32, 6), "stage 3": (8, 12), "stage 4": (2, 24)}
QUICK = {"stage 1": (32, 3), "stage 3": (4, 12)}
NUM_TOKENS, HEAD_CHANNELS = 392, 32

Attention = Callable[[Tensor, Tensor], Tensor]


def of_pytorch(qkv: Tensor, bias: Tensor) -> Tensor:
    """(windows, tokens, 3 * C) and (heads, tokens, tokens) -> (windows, tokens, C)."""
    q, k, v = qkv.unflatten(-1, (3, len(bias), -1)).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None]).transpose(1, 2).flatten(2)


def ours(qkv: Tensor, bias: Tensor) -> Tensor:
    """The same."""
    return attend(qkv, bias, [(len(qkv), None)])


FORMS: dict[str, Attention] = {"PyTorch": of_pytorch, "ours": ours}


def compare(num_windows: int, num_heads: int, *, rounds: int, device: torch.device) -> dict[str, float]:
    """Ratios of ours to PyTorch's, and the memory of both."""
    generator = torch.Generator().manual_seed(0)
    channels = num_heads * HEAD_CHANNELS
    shapes = ((num_windows, NUM_TOKENS, 3 * channels), (num_heads, NUM_TOKENS, NUM_TOKENS))
    qkv, bias = (torch.randn(shape, generator=generator).to(device).requires_grad_() for shape in shapes)
    qkv.grad, bias.grad = torch.zeros_like(qkv), torch.zeros_like(bias)

    def forward(attention: Attention) -> Tensor:
        with torch.no_grad():
            return attention(qkv, bias)

    def both(attention: Attention) -> Tensor:
        out = attention(qkv, bias)
        out.square().sum().backward()
        return out.detach()

    torch.testing.assert_close(forward(ours), both(of_pytorch), rtol=1e-4, atol=1e-5)
    found: dict[str, float] = {}
    for what, run in (("forward", forward), ("both", both)):
        pairs = [
            {name: seconds(lambda form=form, run=run: run(form), device) for name, form in FORMS.items()}
            for _ in range(rounds + 1)
        ][1:]
        found[f"{what}_ms"] = 1e3 * statistics.median(pair["ours"] for pair in pairs)
        found[f"{what}_ours_to_pytorch"] = statistics.median(pair["ours"] / pair["PyTorch"] for pair in pairs)
    state_bytes = qkv.numel() // 3 * qkv.element_size()
    for name, form in FORMS.items():
        found[f"states_{name.lower()}"] = peak_bytes(lambda form=form: both(form), device) / state_bytes
    return found


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = {
        name: compare(*case, rounds=3 if arguments.quick else 11, device=arguments.device)
        for name, case in (QUICK if arguments.quick else CASES).items()
    }
    heads = ("forward ms", "/ PyTorch's", "both ms", "/ PyTorch's", "states", "PyTorch's")
    print(f"{'':10}" + "".join(f"{head:>13}" for head in heads))
    for name, row in rows.items():
        figures = [row["forward_ms"], row["forward_ours_to_pytorch"], row["both_ms"], row["both_ours_to_pytorch"]]
        figures += [row["states_ours"], row["states_pytorch"]]
        print(f"{name:10}" + "".join(f"{figure:13.2f}" for figure in figures))
    if arguments.json:
        write_json(arguments.json, rows)


if __name__ == "__main__":
    main()
