"""One rank of part `zero`: trains the demo's detector on noise, and counts every storage. `zero.py` starts it.

torchrun --nproc-per-node N benchmarks/evidence/zero_rank.py PRESET STEPS FILE
"""

from __future__ import annotations

import gc
import os
import statistics
import sys
import time

import torch
from torch.utils._pytree import tree_leaves

from re2tal.config import build_detector
from re2tal.distributed import resolve_world
from re2tal.planning.zero_memory import Weights, zero_memory
from re2tal.recipes.presets import demo
from re2tal.reversible.live_bytes import LiveBytes
from re2tal.runs.deepspeed_presets import find_preset
from re2tal.strict_json import write_json
from re2tal.training.engine import build_engine
from re2tal.training.optimizer import build_optimizer
from re2tal.training.process_group import join, leave
from re2tal.training.zero_file import resolve_deepspeed_config


def main(preset: str, steps: int, path: str) -> None:
    """Rank 0 writes bytes between steps and in the optimizer's step, counted and modelled, and seconds of a step."""
    run, world = demo(), resolve_world(os.environ)
    join(world, run.engine)
    settings = resolve_deepspeed_config(find_preset(preset), run.engine, world_size=world.world_size)
    torch.manual_seed(0)
    with LiveBytes() as live:
        model = build_detector(run, [f"class {number}" for number in range(8)])
        weights = Weights.of(model, run.optimizer, settings)
        engine = build_engine(model, build_optimizer(model, run.optimizer), factor=lambda step: 1.0, settings=settings)
        clips = run.data.clips
        frames = torch.randn(run.engine.batch_size, 3, clips.windowing.num_frames, clips.size, clips.size)
        mask = torch.ones(frames.shape[0], frames.shape[2], dtype=torch.bool)
        given, seconds = live.live, []
        given = frames.nbytes + mask.nbytes
        for _ in range(steps):
            gc.collect()
            standing = live.live - given
            start = time.perf_counter()
            outputs = engine(frames, mask)
            loss = torch.stack([one.sum() for one in tree_leaves(outputs) if one.requires_grad]).sum()
            engine.backward(loss)
            del outputs, loss
            live.peak = live.live
            engine.step()
            seconds.append(time.perf_counter() - start)
        peak = live.peak - given
    zero = zero_memory(weights, settings, bytes_each=4, world_size=world.world_size, averaged=False, on_cpu=True)
    if world.is_main:
        kept = zero.gathered + zero.gradients + zero.buckets if settings["zero_optimization"]["stage"] == 3 else 0
        write_json(
            path,
            {
                "between steps": standing,
                "between steps, modelled": zero.standing + kept,
                "optimizer's step": peak,
                "optimizer's step, modelled": zero.standing + zero.step,
                "seconds": statistics.median(seconds[1:]),
                "trained numbers": weights.trained,
            },
        )
    leave()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
