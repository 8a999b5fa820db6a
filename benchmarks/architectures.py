"""Which networks can be rewired: architectures of transformers, timm and torch, each rewired, or refused with a reason.

    python benchmarks/architectures.py [--quick] [--only NAME ...] [--json FILE] [--markdown FILE]

Small configurations with random weights, in float64, evaluation mode. timm is an extra: without it its rows are left
out, and the command says so. A network that is refused in branches is tried in whole blocks (`unit="block"`).

    params, flops   share of parameters, and of multiplications, in blocks that were rewired
    beta = 0        largest difference of any output from the plain network's, on other inputs than rewiring saw
    gradients       largest difference between recomputed and kept activations of the rewired network, beta = 1
    different       a network that was rewired and is another one at beta 0, or has other gradients: a bug
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import logging
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
import transformers
from architecture_rows import QUICK, ROWS, Row
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

from re2tal.rewire import RewireReport, RewiringConfig, rewire
from re2tal.rewire.stage import RewiredStage
from re2tal.strict_json import write_json
from re2tal.tables import text_table


@dataclass
class Result:
    """Of one architecture."""

    name: str
    library: str
    status: str
    """"rewired", "refused", "different" or "failed"."""
    reason: str = ""
    unit: str = ""
    params: float = 0.0
    flops: float = 0.0
    beta_0: float = 0.0
    gradients: float = 0.0


def examine(row: Row) -> Result:
    """Builds, rewires and compares."""
    torch.manual_seed(0)
    torch.backends.mha.set_fastpath_enabled(False)  # which hides its multiplications
    plain = row.build().double().eval()
    for module in plain.modules():  # layer scales of 1e-6 and norms of zero would hide what a block does
        for parameter in module.parameters(recurse=False):
            nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.2)
    seen, other = row.example(), row.example()
    reasons = []
    for unit in ("branch", "block"):
        model = copy.deepcopy(plain)
        try:
            report = rewire(model, config=RewiringConfig(unit=unit, beta=0.0), example=seen)
        except ValueError as error:
            reasons.append(str(error))
            continue
        return _compare(row, plain, model, report, unit, seen, other)
    return Result(row.name, row.library, "refused", _short(reasons[-1]))


def _compare(
    row: Row, plain: nn.Module, model: nn.Module, report: RewireReport, unit: str, seen: Any, other: Any
) -> Result:
    blocks = [stage.name_of(name) for stage in _stages(model) for name in stage.residual]
    found = Result(row.name, row.library, "rewired", unit=unit)
    left = [
        reason.partition(": ")[2].partition(": it turns")[0] for stage in report.stages for reason in stage.left_alone
    ]
    found.reason = "; ".join(dict.fromkeys(left))
    total = sum(parameter.numel() for parameter in plain.parameters())
    inside = {parameter for name in blocks for parameter in plain.get_submodule(name).parameters()}
    found.params = sum(parameter.numel() for parameter in inside) / total
    found.flops = _share_of_flops(plain, blocks, other)
    with torch.no_grad():
        found.beta_0 = _largest_difference(_call(plain, other), _call(model, other))
    gradients = []
    for recompute in (True, False):
        network = copy.deepcopy(plain)
        rewire(network, config=RewiringConfig(unit=unit, recompute=recompute), example=seen)
        gradients.append(_gradients(network.train(row.training), other))
    found.gradients = _largest_difference(*gradients)
    if not (found.beta_0 <= row.tolerance and found.gradients <= 1e-6):
        found.status = "different"
    return found


def _stages(model: nn.Module) -> list[RewiredStage]:
    return [module for module in model.modules() if isinstance(module, RewiredStage)]


def _call(model: nn.Module, example: Any) -> Any:
    example = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, example)
    torch.manual_seed(0)  # masked autoencoders draw in evaluation too
    return model(**example) if isinstance(example, Mapping) else model(*example)


def _share_of_flops(model: nn.Module, blocks: Sequence[str], example: Any) -> float:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        _call(copy.deepcopy(model).requires_grad_(False), example)
    counts = {name: sum(found.values()) for name, found in counter.get_flop_counts().items()}
    root = type(model).__name__
    return sum(counts.get(f"{root}.{name}", 0) for name in set(blocks)) / counts["Global"]


def _tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _gradients(model: nn.Module, example: Any) -> list[Tensor]:
    """Of every parameter, of a sum of all outputs with fixed weights."""
    outputs = _tensors(_call(model, example))
    weights = torch.Generator().manual_seed(1)
    torch.stack(
        [
            (one * torch.randn(one.shape, generator=weights, dtype=one.dtype)).sum()
            for one in outputs
            if one.requires_grad
        ]
    ).sum().backward()
    return [torch.zeros_like(one) if one.grad is None else one.grad for one in model.parameters()]


def _largest_difference(wanted: Any, found: Any) -> float:
    """By tensor, of its largest element; infinite where shapes or numbers of tensors differ.

    A tensor that is zero but for rounding, as the gradient of a key's bias, counts as a millionth of the largest one.
    """
    wanted, found = _tensors(wanted), _tensors(found)
    if [one.shape for one in wanted] != [one.shape for one in found]:
        return float("inf")
    largest = [float(one.abs().max()) if one.numel() else 0.0 for one in wanted]
    floor = max(1e-6 * max(largest), 1e-30)
    errors = [
        float((want - have).abs().max()) if want.numel() else 0.0 for want, have in zip(wanted, found, strict=True)
    ]
    return max(error / max(size, floor) for error, size in zip(errors, largest, strict=True))


def _short(reason: str) -> str:
    """On one line, without what every refusal opens with."""
    opening, _, rest = reason.partition("left alone, because")
    return shorten(rest or opening, 200, placeholder=" ..")


def examine_all(rows: Sequence[Row]) -> Iterator[Result]:
    """Prints progress; what raises anything but a refusal has failed."""
    for row in rows:
        try:
            result = examine(row)
        except Exception as error:  # recorded, and the next one runs
            result = Result(row.name, row.library, "failed", f"{type(error).__name__}: {_short(str(error))}")
        print(f"{result.status:10}{row.name}  {result.reason[:150]}", file=sys.stderr, flush=True)
        yield result


def cells(result: Result) -> tuple[str, ...]:
    """A row of the table."""
    if result.status in ("refused", "failed"):
        return result.name, result.library, result.status, "", "", "", "", result.reason
    return (
        result.name,
        result.library,
        result.status if result.unit == "branch" else f"{result.status}, {result.unit}s",
        f"{result.params:.0%}",
        f"{result.flops:.0%}",
        f"{result.beta_0:.0e}",
        f"{result.gradients:.0e}",
        result.reason,
    )


HEAD = (
    "architecture",
    "library",
    "outcome",
    "params",
    "flops",
    "beta = 0",
    "gradients",
    "left alone, or refused, because",
)


def markdown(results: Sequence[Result]) -> str:
    """The table for documentation."""
    lines = [HEAD, ("---",) * len(HEAD), *(cells(result) for result in results)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> None:
    """Prints the table and its totals; exits with 1 where a network is different, or failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="only the rows that the tests run")
    parser.add_argument("--only", nargs="+", help="rows by name")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path, help="file for the table as documentation has it")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    names = arguments.only or (QUICK if arguments.quick else [row.name for row in ROWS])
    if unknown := set(names) - {row.name for row in ROWS}:
        raise SystemExit(f"unknown: {sorted(unknown)}; known: {[row.name for row in ROWS]}")
    rows = [row for row in ROWS if row.name in names]
    if importlib.util.find_spec("timm") is None and any(row.library == "timm" for row in rows):
        print("timm is not installed, its rows are left out: pip install timm", file=sys.stderr)
        rows = [row for row in rows if row.library != "timm"]
    results = list(examine_all(rows))
    print(text_table([HEAD, *(cells(result) for result in results)], align="<"))
    totals = Counter(result.status for result in results)
    print(f"{len(results)} architectures: {', '.join(f'{count} {status}' for status, count in totals.items())}")
    if arguments.json:
        write_json(arguments.json, {result.name: asdict(result) for result in results})
    if arguments.markdown:
        arguments.markdown.write_text(markdown(results))
    sys.exit(bool(totals["different"] or totals["failed"]))


if __name__ == "__main__":
    main()
