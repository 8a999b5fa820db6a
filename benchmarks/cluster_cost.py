"""What a run costs on a cluster, on paper: python benchmarks/cluster_cost.py [--recipe NAME] --json FILE

Constants are measured here, on two cores, in a few minutes: what the collectives of each ZeRO stage carry, bytes and
seconds of a checkpoint, an index and an epoch's order of a million videos, processor time of a clip. The tables are
arithmetic on them, for 1 to 512 GPUs and up to a million videos; NOTHING OF IT WAS RUN ON A CLUSTER.

    bytes that a rank sends in a step = sum over collectives of their payload x share
        share = 2 (n - 1) / n for all-reduce, (n - 1) / n for the others       (rings; n ranks)
    payload = factor x bytes of a number in the run's type x trained numbers   (factors: measured, in whole models)
    checkpoint = trained numbers x (bytes in the run's type + 12 of masters and moments + 4 of the average)
    cores of a node = clips per second x processor seconds of a clip x 1.3
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from re2tal.config import build_detector
from re2tal.data.contract.shards import open_shards
from re2tal.data.streaming.stream import ClipConfig, stream_clips
from re2tal.data.streaming.windows import Slide
from re2tal.distributed import resolve_world
from re2tal.planning.zero_memory import Weights, zero_memory
from re2tal.recipes import find_recipe
from re2tal.rewire import Branch, RewiringConfig, residual_branches, rewire
from re2tal.runs.deepspeed_presets import find_preset
from re2tal.strict_json import write_json
from re2tal.tables import text_table
from re2tal.training.checkpoint import CheckpointStore
from re2tal.training.config import EngineConfig
from re2tal.training.ema import WeightAverage
from re2tal.training.engine import build_engine
from re2tal.training.manifest import TrainingProgress
from re2tal.training.optimizer import OptimizerConfig, build_optimizer
from re2tal.training.process_group import join, leave
from re2tal.training.zero_file import resolve_deepspeed_config

RANKS = (1, 8, 64, 512)
VIDEOS = (10_000, 100_000, 1_000_000)
STAGES = (0, 1, 2, 3)
COLLECTIVES = ("all_reduce", "reduce", "broadcast", "all_gather", "all_gather_into_tensor", "reduce_scatter_tensor")
MEASURED_RANKS = 2
KEPT, LET_GO, STORED = "kept", "let go", "let go, stored"
"""Ways of stage 3: gathered parameters stay from forward to backward, as they do by DeepSpeed's defaults while the
model has less than a billion numbers; or not, and then with activations that are recomputed, or stored."""
STEPS = 3


# ------------------------------------------------------------------------------------------------- one rank, measured


def count_payloads(sums: Counter[str]) -> None:
    """From now on adds to `sums` the bytes that each collective of floating numbers carries."""

    def counting(name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            first = given[0] if given else named.get("tensor", named.get("output_tensor"))
            if name == "reduce_scatter_tensor":
                first = given[1] if len(given) > 1 else named["input"]
            tensors = first if isinstance(first, list) else [first]
            sums[name] += sum(one.nbytes for one in tensors if one.is_floating_point())
            return plain(*given, **named)

        return call

    for name in COLLECTIVES:
        setattr(dist, name, counting(name, getattr(dist, name)))


def measure_rank(stage: int, accumulation: int, way: str, path: Path) -> None:
    """One rank: payloads of a step in whole models, and what a checkpoint takes; rank 0 writes them."""
    sums: Counter[str] = Counter()
    count_payloads(sums)

    world, config = resolve_world(os.environ), EngineConfig(gradient_accumulation=accumulation, timeout_minutes=5)
    join(world, config)
    ds = path.with_suffix(f".{world.rank}.ds")
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
    if way != KEPT:
        zero |= {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}
    ds.write_text(json.dumps({"zero_optimization": zero}))
    model = residual_network(recompute=way != STORED)
    trained = sum(one.numel() for one in model.parameters())
    engine = build_engine(
        model,
        build_optimizer(model, OptimizerConfig()),
        factor=lambda step: 1.0,
        settings=resolve_deepspeed_config(ds, config, world_size=world.world_size),
    )
    x = torch.randn(2, 4, WIDTH)
    for step in range(STEPS + 1):
        if step == 1:  # the first one of stage 3 records what comes when
            sums.clear()
        for _ in range(accumulation):
            engine.backward(engine(x).square().mean())
            engine.step()
    payload = {name: value / STEPS / (4 * trained) for name, value in sums.items()}
    store = CheckpointStore(path.parent / f"{path.stem}-checkpoints", identity={})
    began = time.perf_counter()
    folder = store.save(engine, WeightAverage(engine, decay=0.999), TrainingProgress(step=STEPS))
    seconds = time.perf_counter() - began
    if world.is_main:
        size = sum(file.stat().st_size for file in folder.iterdir())
        found = {"payload": payload, "trained": trained, "bytes": size, "seconds": seconds}
        write_json(path, found)
    leave()


WIDTH = 256


class Block(nn.Module):
    """A residual MLP."""

    def __init__(self) -> None:
        super().__init__()
        up, down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.f = nn.Sequential(nn.LayerNorm(WIDTH), up, nn.GELU(), down)

    def branch(self, x: Tensor) -> Tensor:
        """What the block adds."""
        return self.f(x)

    def forward(self, x: Tensor) -> Tensor:
        """x + f(x)."""
        return x + self.branch(x)


@residual_branches.register
def _(block: Block) -> tuple[Branch, ...]:
    return (Branch("f", Block.branch),)


def residual_network(*, recompute: bool) -> nn.Module:
    """Sixteen blocks, rewired: 8.4 million numbers."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Sequential(*(Block() for _ in range(16))))
    rewire(net, config=RewiringConfig(recompute=recompute))
    return net


# ------------------------------------------------------------------------------------------------------ all constants


def measured_by_ranks(folder: Path, stage: int, accumulation: int, *, way: str = KEPT) -> dict[str, Any]:
    path = folder / f"{stage}-{accumulation}-{way}.json"
    words = ["--nproc-per-node", str(MEASURED_RANKS), __file__, "--rank", str(stage), str(accumulation)]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", *words, way, str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        raise RuntimeError(f"stage {stage}: a rank failed: {done.stderr[-2000:]}")
    return json.loads(path.read_text())


def measured_data(folder: Path) -> dict[str, float]:
    """A million videos' index and order, and the processor time of a training clip of 256 frames at 224 x 224."""
    from data import measure_open, write_million, write_video  # the benchmark beside this one
    from streaming import cpu_seconds

    million = write_million(folder / "million", VIDEOS[-1])
    size = sum(file.stat().st_size for file in million.iterdir() if file.suffix != ".tar")
    open_shards(million)  # the columns are written once
    context = multiprocessing.get_context("spawn")
    result = context.SimpleQueue()
    process = context.Process(target=measure_open, args=(million, result))
    process.start()
    opened, open_mib, order, order_mib, _ = result.get()
    process.join()
    video = write_video(folder / "video", 60, height=256, width=340)
    config = ClipConfig(windowing=Slide(256, frames_per_second=None), size=224, workers=0)
    stream, clips = stream_clips(open_shards(video), config, batch_size=1, training=True), 8
    next(iter(stream.epoch(0)))
    before = cpu_seconds()
    for epoch in range(clips):
        list(stream.epoch(epoch))
    return {
        "index_bytes": size,
        "open_s": opened,
        "open_mib": open_mib,
        "order_s": order,
        "order_mib": order_mib,
        "clip_cpu_s": (cpu_seconds() - before) / clips,
    }


def measure() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        of_stages = {
            f"stage {stage}, accumulation {number}": measured_by_ranks(folder, stage, number)
            for stage, number in product(STAGES, (1, 2))
        }
        of_stages["stage 3, parameters let go"] = measured_by_ranks(folder, 3, 1, way=LET_GO)
        of_stages["stage 3, let go, activations stored"] = measured_by_ranks(folder, 3, 1, way=STORED)
        return {"of_stages": of_stages, "data": measured_data(folder)}


# --------------------------------------------------------------------------------------------------------- arithmetic


def sent(payload: Mapping[str, float], *, ranks: int) -> float:
    """Models that a rank sends in a step, by rings."""
    return sum(
        value * (ranks - 1) / ranks * (2 if name == "all_reduce" else 1)
        for name, value in payload.items()
        if name != "broadcast"
    )


def weights_of(recipe: str) -> tuple[Any, Any]:
    """The run of a recipe, and its parameters, counted without being made."""

    run = find_recipe(recipe)
    from dataclasses import replace

    bare = replace(run, backbone=replace(run.backbone, weights=None, norm_eval=False))
    with torch.device("meta"):
        model = build_detector(bare, [f"class {number}" for number in range(20)])
    return run, Weights.of(model, run.optimizer, {})


def tables(found: Mapping[str, Any], recipe: str) -> str:

    _, weights = weights_of(recipe)
    model_gb = 2 * weights.trained / 1e9
    parts = [
        f"{recipe}: {weights.trained / 1e6:.1f} million trained numbers, {model_gb:.3f} GB in bf16. Modelled, not run."
    ]
    rows = [["GB that a rank sends in a step", "payloads, in models", *(f"{ranks} GPUs" for ranks in RANKS)]]
    for name, one in found["of_stages"].items():
        carried = ", ".join(f"{key} {value:.2f}" for key, value in one["payload"].items() if value > 0.005)
        rows.append([name, carried, *(f"{model_gb * sent(one['payload'], ranks=ranks):.3f}" for ranks in RANKS)])
    parts.append(text_table(rows, align="<<>"))
    rows = [["GB on a GPU without activations", *(f"{ranks} GPUs" for ranks in RANKS)]]
    for preset in ("zero1", "zero2", "zero3"):
        settings = json.loads(find_preset(preset).read_text())
        each = [
            zero_memory(weights, settings, bytes_each=2, world_size=ranks, averaged=True, on_cpu=False)
            for ranks in RANKS
        ]
        rows.append([preset, *(f"{max(one.during_backward, one.standing + one.step) / 1e9:.3f}" for one in each)])
    parts.append(text_table(rows, align="<>"))
    one = found["of_stages"]["stage 2, accumulation 1"]
    speed = one["bytes"] / MEASURED_RANKS / one["seconds"]
    size = weights.trained * (2 + 12 + 4)
    rows = [["checkpoint", "GB in all", *(f"{ranks} GPUs, s" for ranks in RANKS)]]
    shares = [(16 * weights.trained / ranks + 2 * weights.trained) / speed for ranks in RANKS]
    rows.append([f"at {speed / 1e6:.0f} MB/s a rank", f"{size / 1e9:.3f}", *(f"{share:.1f}" for share in shares)])
    parts.append(text_table(rows, align="<>"))
    data = found["data"]
    rows = [["videos", "index, MB", "open it, s", "order of an epoch, s", "MiB a rank", "core-hours of an epoch"]]
    for videos in VIDEOS:
        share = videos / VIDEOS[-1]
        hours = videos * data["clip_cpu_s"] / 3600
        own = share * (data["open_mib"] + data["order_mib"])
        cells = [data["index_bytes"] * share / 1e6, data["open_s"], data["order_s"] * share, own, hours]
        rows.append([f"{videos:,}", *(f"{cell:,.2f}" for cell in cells)])
    parts.append(text_table(rows, align="<>"))
    cores = data["clip_cpu_s"] * 1.3
    parts.append(f"a GPU that takes c clips a second needs {cores:.2f} c cores for its clips (256 frames, 224 x 224)")
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="thumos14_re2swin_tiny", help="whose parameters are counted")
    parser.add_argument("--json", type=Path, help="file for the constants")
    parser.add_argument("--from", dest="earlier", type=Path, help="take the constants from this file")
    parser.add_argument("--rank", nargs=4, metavar=("STAGE", "ACCUMULATION", "WAY", "FILE"), help="used by itself")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.rank:
        stage, accumulation, way, path = given.rank
        measure_rank(int(stage), int(accumulation), way, Path(path))
        return
    found = json.loads(given.earlier.read_text()) if given.earlier else measure()
    print(tables(found, given.recipe))
    if given.json:
        write_json(given.json, found)


if __name__ == "__main__":
    main()
