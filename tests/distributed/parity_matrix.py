"""Every way to train against one reference without DeepSpeed: python tests/distributed/parity_matrix.py --json FILE

    ZeRO stage 0 to 3 x offload x accumulation 1, 2 x fp32, bf16 x plain, rewired     96 cells, two ranks over gloo

The reference is plain torch in one process and float64: the batches of all ranks one after the other, autograd that
keeps its activations, the mean of the gradients, their norm clipped, AdamW. Each cell trains the same small detector
for STEPS steps and says how far it is from that: the largest difference of a loss, and of a weight. A cell that the
program refuses says so in the program's words. Under bf16 the yardstick is plain torch: bfloat16, float32 masters.

Without dropout and drop path, which draw from the generators of a rank. Weights start at up to 1, and move by up to
STEPS x RATE.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # before `tests` is looked at: run as a script, its folder is not on the path
    sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from distributed.ranks import run_ranks
from torch import Tensor, nn

from re2tal.backbones.swin3d.network import VideoSwin
from re2tal.detector import TemporalActionDetector
from re2tal.distributed import resolve_world, value_of_each_rank
from re2tal.localizers import ActionFormerConfig, build_localizer
from re2tal.localizers.losses import RunningCount
from re2tal.rewire import RewiringConfig, rewire
from re2tal.structures import Action, ClipBatch, Timeline
from re2tal.training.config import DTYPES, EngineConfig
from re2tal.training.engine import build_engine
from re2tal.training.engine_weights import gather_weights
from re2tal.training.micro_batch import forward
from re2tal.training.optimizer import OptimizerConfig, build_optimizer
from re2tal.training.process_group import join, leave
from re2tal.training.zero_file import resolve_deepspeed_config

RANKS, STEPS, FRAMES, RATE, CLIPPING = 2, 6, 8, 2e-3, 1.0
STAGES, ACCUMULATIONS, PRECISIONS, WIRINGS = (0, 1, 2, 3), (1, 2), ("fp32", "bf16"), ("plain", "rewired")
OFFLOADS: dict[str, tuple[str, ...]] = {
    "none": (),
    "optimizer": ("offload_optimizer",),
    "optimizer, parameters": ("offload_optimizer", "offload_param"),
}
EXACT = 1e-6
"""What fp32 may differ by, in losses and weights of about 1."""


@dataclass(frozen=True)
class Cell:
    """One way to train."""

    stage: int
    offload: str
    accumulation: int
    precision: str
    wiring: str


def cells() -> Iterator[Cell]:
    """All of them."""
    for values in product(STAGES, OFFLOADS, ACCUMULATIONS, PRECISIONS, WIRINGS):
        yield Cell(*values)


# -------------------------------------------------------------------------------------------- what all of them train


def network(*, wiring: str, recompute: bool, grid: Any = "auto", drop_path: float = 0.0) -> TemporalActionDetector:
    torch.manual_seed(0)
    backbone = VideoSwin(
        embed_dim=12, depths=(3, 1), num_heads=(2, 2), window=(2, 2, 2), patch=(2, 4, 4), drop_path=drop_path
    )
    if wiring == "rewired":
        rewire(backbone, config=RewiringConfig(recompute=recompute, grid=grid))
    localizer = build_localizer(
        ActionFormerConfig(
            channels=16, num_heads=2, num_embedding_convs=1, num_stem_blocks=1, max_num_steps=4,
            path_drop=drop_path / 3, regression_ranges=((0, 4), (4, 100)), initial_positives=4,
        ),
        in_channels=backbone.out_channels,
        classes=["a", "b"],
    )  # fmt: skip
    return TemporalActionDetector(backbone, localizer, num_steps=4)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """The program's own, with an eps that keeps it from blowing up the rounding of gradients near zero."""
    optimizer = build_optimizer(model, OptimizerConfig(learning_rate=RATE, backbone_learning_rate=RATE))
    for group in optimizer.param_groups:
        group["eps"] = 1e-2
    return optimizer


def batch(place: int) -> tuple[Tensor, ClipBatch]:
    """Frames and the rest of one clip, by its place among all clips of the run."""
    frames = torch.randn(1, 3, FRAMES, 8, 8, generator=torch.Generator().manual_seed(place))
    start = 0.1 * (place % 5)
    mask = torch.ones(1, FRAMES, dtype=torch.bool)
    actions = ((Action(start, start + 0.7, "ab"[place % 2]),),)
    return frames, ClipBatch(
        frames=torch.zeros(1, 3, FRAMES, 8, 8, dtype=torch.uint8), frame_mask=mask, actions=actions,
        timelines=(Timeline(0.0, 0.2, 1.6),), video_ids=(f"video{place}",), window_ids=(0,),
        valid=torch.ones(1, dtype=torch.bool),
    )  # fmt: skip


def counts_of(model: nn.Module) -> list[RunningCount]:
    return [module for module in model.modules() if isinstance(module, RunningCount)]


# --------------------------------------------------------------------------------------------------------- one of them


def train_cell(cell: Cell, folder: Path, rank: int) -> dict[str, Any]:
    """Losses of this rank by place, and on rank 0 all weights; or the words in which the cell is refused."""
    config = EngineConfig(
        gradient_accumulation=cell.accumulation, gradient_clipping=CLIPPING, precision=cell.precision, timeout_minutes=5
    )
    # No parameter small enough to stay whole: under stage 3 every branch gathers what it uses.
    zero: dict[str, Any] = {"stage": cell.stage, "stage3_param_persistence_threshold": 0}
    zero |= {name: {"device": "cpu"} for name in OFFLOADS[cell.offload]}
    path = folder / f"ds{rank}.json"
    path.write_text(json.dumps({"zero_optimization": zero, "bf16": {"enabled": "auto"}}))
    try:
        settings = resolve_deepspeed_config(path, config, world_size=RANKS)
    except ValueError as error:
        return {"refused": str(error).removeprefix(f"{path}: ")}
    model = network(wiring=cell.wiring, recompute=True)
    for count in counts_of(model):
        count.of_all_ranks = value_of_each_rank
    engine = build_engine(model, adamw(model), factor=lambda step: 1.0, settings=settings)
    dtype, losses = DTYPES[config.precision], {}
    for step in range(STEPS):
        for count in counts_of(model):
            count.begin_step()
        for number in range(cell.accumulation):
            place = (step * cell.accumulation + number) * RANKS + rank
            frames, rest = batch(place)
            micro = forward(engine, rest, frames.to(dtype))
            engine.backward(micro.total)
            engine.step()
            losses[str(place)] = float(micro.total.detach())
    found = {"losses": losses, "weights": gather_weights(engine)}
    engine.destroy()
    return found


def train_cells(wanted: list[dict[str, Any]], folder: str) -> list[dict[str, Any]]:
    """One start of the ranks for all of them."""
    world = resolve_world(os.environ)
    join(world, EngineConfig(timeout_minutes=5))
    found = [train_cell(Cell(**one), Path(folder), world.rank) for one in wanted]
    leave()
    return found


# ------------------------------------------------------------------------------------------------------- the reference


def reference(*, wiring: str, accumulation: int, dtype: torch.dtype) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Losses by place, and weights. In float64, or in bfloat16 with float32 masters."""
    master = network(wiring=wiring, recompute=False, grid=None)
    master = master.double() if dtype == torch.float64 else master
    optimizer, losses = adamw(master), {}
    model = master if dtype == torch.float64 else network(wiring=wiring, recompute=False, grid=None).to(dtype)
    pairs = list(zip(master.parameters(), model.parameters(), strict=True))
    batches = accumulation * RANKS
    for step in range(STEPS):
        sums = [torch.zeros_like(weight) for weight, _ in pairs]
        for weight, narrow in pairs:
            narrow.data.copy_(weight.data)
        for count in counts_of(model):
            count.begin_step()
        for place in range(step * batches, (step + 1) * batches):
            model.zero_grad()
            frames, rest = batch(place)
            outputs = model(frames.to(dtype), rest.frame_mask)
            if dtype != torch.float64:  # losses of half a precision are summed in float32, as in the program
                outputs = torch.utils._pytree.tree_map(
                    lambda one: one.float() if one.is_floating_point() else one, outputs
                )
            loss = model.loss(outputs, rest.actions, rest.timelines, num_frames=FRAMES)["total"]
            loss.backward()
            losses[str(place)] = float(loss.detach())
            for total, (_, narrow) in zip(sums, pairs, strict=True):
                total += 0 if narrow.grad is None else narrow.grad.to(total) / batches
        for total, (weight, _) in zip(sums, pairs, strict=True):
            weight.grad = total
        nn.utils.clip_grad_norm_(master.parameters(), CLIPPING)
        optimizer.step()
    return losses, {name: weight.detach() for name, weight in master.named_parameters()}


def distance(
    losses: Mapping[str, float],
    weights: Mapping[str, Tensor],
    wanted: tuple[Mapping[str, float], Mapping[str, Tensor]],
) -> dict[str, float]:
    """The largest differences of losses and weights."""
    assert losses.keys() == wanted[0].keys()
    return {
        "loss": max(abs(losses[place] - loss) for place, loss in wanted[0].items()),
        "weight": max(float((weights[name].double() - value).abs().max()) for name, value in wanted[1].items()),
    }


def compare(wanted: Sequence[Cell]) -> list[dict[str, Any]]:
    """Trains the cells on ranks; each with its distance, the yardstick's, and whether it held; or why it is refused."""
    with tempfile.TemporaryDirectory() as folder:
        of_ranks = run_ranks(
            train_cells,
            world_size=RANKS,
            timeout_seconds=120 + 20 * len(wanted),
            wanted=[asdict(cell) for cell in wanted],
            folder=folder,
        )
    known: dict[tuple, Any] = {}

    def reference_of(cell: Cell, dtype: torch.dtype) -> Any:
        key = (cell.wiring, cell.accumulation, dtype)
        if key not in known:
            known[key] = reference(wiring=cell.wiring, accumulation=cell.accumulation, dtype=dtype)
        return known[key]

    rows = []
    for cell, found in zip(wanted, zip(*of_ranks, strict=True), strict=True):
        row: dict[str, Any] = asdict(cell)
        if "refused" in found[0]:
            rows.append(row | {"refused": found[0]["refused"]})
            continue
        exact = reference_of(cell, torch.float64)
        losses = {place: loss for of_rank in found for place, loss in of_rank["losses"].items()}
        row |= distance(losses, found[0]["weights"], exact)
        allowed = {"loss": EXACT, "weight": EXACT}
        if cell.precision == "bf16":
            row["plain bf16"] = yardstick = distance(*reference_of(cell, torch.bfloat16), exact)
            allowed = {name: 2 * value for name, value in yardstick.items()}
        row["held"] = all(row[name] <= allowed[name] for name in allowed)
        rows.append(row)
    return rows


def table(rows: Sequence[Mapping[str, Any]], precision: str) -> str:
    """Markdown: stage and offload down, the rest across; loss / weight, or "refused"."""
    across = list(product(WIRINGS, ACCUMULATIONS))
    shown = {
        (row["stage"], row["offload"], row["wiring"], row["accumulation"]): row
        for row in rows
        if row["precision"] == precision
    }
    heads = [f"{wiring}, {accumulation} batch{'es' * (accumulation > 1)}" for wiring, accumulation in across]
    lines = [f"| {precision}: stage, offload | {' | '.join(heads)} |", "|---" * (1 + len(heads)) + "|"]
    for stage, offload in product(STAGES, OFFLOADS):
        of_row = [shown[stage, offload, *rest] for rest in across]
        texts = ["refused" if "refused" in row else _figures(row) for row in of_row]
        lines.append(f"| {stage}, {offload} | {' | '.join(texts)} |")
    if precision == "bf16":
        texts = [
            " / ".join(f"{value:.0e}" for value in row["plain bf16"].values())
            for row in (shown[3, "none", *rest] for rest in across)
        ]
        lines.append(f"| plain torch | {' | '.join(texts)} |")
    return "\n".join(lines)


def _figures(row: Mapping[str, Any]) -> str:
    return f"{row['loss']:.0e} / {row['weight']:.0e}" + ("" if row["held"] else " (!)")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="file to write the cells to")
    given = parser.parse_args()
    rows = compare(list(cells()))
    given.json.write_text(json.dumps(rows, indent=1) + "\n")
    print("\n\n".join(table(rows, precision) for precision in PRECISIONS))
    for message in dict.fromkeys(row["refused"] for row in rows if "refused" in row):
        print(f"refused: {message}")
    return 0 if all(row.get("held", True) for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
