"""The arithmetic of ZeRO against DeepSpeed itself: two ranks, every storage counted."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from distributed.ranks import run_ranks
from torch import Tensor, nn

from re2tal.distributed import resolve_world
from re2tal.planning.zero_memory import Weights, zero_memory
from re2tal.reversible.live_bytes import LiveBytes
from re2tal.training import engine as engine_module
from re2tal.training.config import DTYPES, EngineConfig
from re2tal.training.engine import build_engine
from re2tal.training.optimizer import OptimizerConfig, build_optimizer
from re2tal.training.process_group import join
from re2tal.training.zero_file import resolve_deepspeed_config

FOLDER = Path(__file__).parents[2] / "ds_configs"
WORLD_SIZE, BUCKET, NUM_STEPS = 2, 100_000, 2
CASES = {
    "no ZeRO": ("zero1", 0, "fp32"),
    "ZeRO 1": ("zero1", 1, "bf16"),
    "ZeRO 2": ("zero2", 2, "fp32"),
    "ZeRO 2 in bf16": ("zero2", 2, "bf16"),
    "ZeRO 3": ("zero3", 3, "bf16"),
    "ZeRO 2 offloaded": ("zero2_offload", 2, "bf16"),
    "ZeRO 3 offloaded": ("zero3_offload", 3, "bf16"),
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(*(nn.Sequential(nn.Linear(256, 256), nn.LayerNorm(256)) for _ in range(8)))
        self.localizer = nn.Linear(256, 256)

    def forward(self, x: Tensor) -> Tensor:
        return self.localizer(self.backbone(x))


def settings_of(folder: str, case: str) -> tuple[dict, EngineConfig]:
    name, stage, precision = CASES[case]
    config = EngineConfig(precision=precision)  # type: ignore[arg-type]
    file = json.loads((FOLDER / f"{name}.json").read_text())
    zero = file["zero_optimization"]
    file["zero_optimization"] = {key: BUCKET if "bucket" in key else value for key, value in zero.items()} | {
        "stage": stage
    }
    path = Path(folder) / f"{case}{os.environ.get('RANK', '')}.json"
    path.write_text(json.dumps(file))
    return resolve_deepspeed_config(path, config, world_size=WORLD_SIZE), config


def count_all(folder: str) -> dict[str, list[int]]:
    """Bytes between steps, and the most in a step's backward and in the optimizer's step, by case."""
    join(resolve_world(os.environ), EngineConfig())
    return {case: count(*settings_of(folder, case)) for case in CASES}


def count(settings: dict, config: EngineConfig) -> list[int]:
    with LiveBytes() as live:
        model = Net()
        optimizer = build_optimizer(model, OptimizerConfig())
        loading = LiveBytes()
        with patch.object(engine_module, "shard", partial(counted_by, loading, engine_module.shard)):
            engine = build_engine(model, optimizer, factor=lambda step: 1.0, settings=settings)
        for _ in range(NUM_STEPS):
            gc.collect()
            standing = live.live
            loss = engine(torch.ones(1, 256, dtype=DTYPES[config.precision])).float().square().mean()
            live.peak = live.live
            engine.backward(loss)
            del loss
            backward, live.peak = live.peak, live.live
            engine.step()
        found = [standing, backward, live.peak, loading.peak]
        engine.destroy()
    return found


def counted_by(live: LiveBytes, shard: Callable, *args: Any, **options: Any) -> None:
    with live:
        shard(*args, **options)


@pytest.fixture(scope="module")
def counted(tmp_path_factory) -> dict[str, list[int]]:
    folder = str(tmp_path_factory.mktemp("zero"))
    return run_ranks(count_all, world_size=WORLD_SIZE, timeout_seconds=280, folder=folder)[0]


@pytest.mark.parametrize("case", CASES)
def test_the_arithmetic_is_what_deepspeed_holds(case, counted, tmp_path) -> None:
    settings, config = settings_of(str(tmp_path), case)
    model = Net()
    weights = Weights.of(model, OptimizerConfig(), settings)
    size = DTYPES[config.precision].itemsize
    zero = zero_memory(weights, settings, bytes_each=size, world_size=WORLD_SIZE, averaged=False, on_cpu=True)
    between_steps, backward, step, loading = counted[case]
    stage = settings["zero_optimization"]["stage"]
    if stage == 3:
        host = zero.host and size * -(-(weights.trained + weights.frozen) // WORLD_SIZE)  # the same memory on a CPU
        assert zero.loading + host == pytest.approx(loading, rel=0.02)
    # Stage 3 keeps its bucket and its shard of gradients; on a CPU what is offloaded is in the same memory.
    kept = zero.gathered + zero.gradients + zero.buckets if stage == 3 else 0
    assert zero.standing + zero.host + kept == pytest.approx(between_steps, rel=0.02)
    # Backward makes gradients too: all of them stay below stage 2, one or two at a time from there on.
    made = size * (weights.trained if stage < 2 else 2 * weights.largest)
    peak = max(zero.during_backward + made, zero.standing + zero.step)
    if zero.host:
        made += 4 * weights.largest  # on its way there in float32
        assert zero.during_backward + zero.host + made == pytest.approx(backward, rel=0.05)
    else:
        assert peak == pytest.approx(max(backward, step), rel=0.05)
