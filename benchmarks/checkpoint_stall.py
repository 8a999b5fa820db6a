"""How long training stands still for a checkpoint of a model of real size.

    python benchmarks/checkpoint_stall.py [--quick] [--recipe NAME] [--ds zero2] --json FILE
    torchrun --nproc-per-node 2 benchmarks/checkpoint_stall.py --out NEW_FOLDER --json FILE

The recipe's whole detector is trained for a few steps on small demo videos, which changes no size of
a weight or a moment, and is saved every other step. Keys: gb (of a checkpoint, all ranks), save_s (from the call to the
renamed folder: checks, writing, flushing, checksums; median, the first left out), raw_s (the same bytes written to the
same disk and flushed, by all ranks at once), save_vs_raw (of the two), step_s_for_2_percent (how long a step has to
take for saves every training.checkpoint_every_steps to be 2 % of the time). `--quick`: the recipe demo.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

import re2tal
from re2tal.config import RunConfig
from re2tal.data.streaming.windowing import ResizeWhole
from re2tal.recipes import find_recipe
from re2tal.strict_json import write_json
from re2tal.training.checkpoint import CheckpointStore

SHARE = 0.02
SAVES = 4


class EnoughError(Exception):
    """Ends the training from inside."""


def small_steps(config: RunConfig) -> RunConfig:
    """The recipe's detector and optimizer on little data, saved every other step and evaluated never."""
    clips = replace(config.data.clips, windowing=ResizeWhole(config.num_steps), size=64, workers=0, augmentation="none")
    return replace(
        config,
        backbone=replace(config.backbone, norm_eval=False),  # there are no weights
        data=replace(find_recipe("demo").data, clips=clips),
        engine=replace(config.engine, batch_size=1, gradient_accumulation=1),
        training=replace(
            config.training, checkpoint_every_steps=2, evaluate_every_epochs=100, keep_best=False, trackers=()
        ),
    )


class Saves:
    """Times every save of this process, and then plain writes of as many bytes."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.raw_seconds: list[float] = []
        self.num_bytes = 0
        plain = CheckpointStore.save

        def save(store: CheckpointStore, engine, average, progress):
            started = time.perf_counter()
            path = plain(store, engine, average, progress)
            self.seconds.append(time.perf_counter() - started)
            self.num_bytes = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
            self.raw_seconds.append(raw_seconds(path, self.num_bytes // dist.get_world_size()))
            if len(self.seconds) > SAVES:
                raise EnoughError
            return path

        CheckpointStore.save = save  # type: ignore[method-assign]


def raw_seconds(folder: Path, num_bytes: int) -> float:
    """To write so many bytes beside the checkpoint and flush them; all ranks start together."""
    target = folder.parent / f"raw-{dist.get_rank()}"
    piece = os.urandom(1 << 24)
    dist.barrier()
    started = time.perf_counter()
    with target.open("wb") as file:
        for _ in range(max(1, num_bytes // len(piece))):
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    dist.barrier()
    seconds = time.perf_counter() - started
    target.unlink()
    return seconds


def measure(recipe: str, ds: str, out: Path | None) -> dict[str, float]:
    """Every rank; the figures are those of the slowest."""
    config = find_recipe(recipe)
    if not isinstance(config, RunConfig):
        raise SystemExit(f"{recipe} trains no detector; `re2tal recipes` lists those that do")
    saves = Saves()
    with tempfile.TemporaryDirectory() as folder, suppress(EnoughError):
        re2tal.train(small_steps(config), ds=ds, out=out or folder)
    save, raw = statistics.median(saves.seconds[1:]), statistics.median(saves.raw_seconds[1:])
    steps = config.training.checkpoint_every_steps
    return {
        "gb": saves.num_bytes / 1e9,
        "save_s": save,
        "raw_s": raw,
        "save_vs_raw": save / raw,
        "step_s_for_2_percent": save * (1 - SHARE) / (SHARE * steps),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="the recipe demo")
    parser.add_argument("--recipe", default="activitynet_re2swin_tiny")
    parser.add_argument("--ds", default="zero2", help="a preset or a DeepSpeed file")
    parser.add_argument("--out", type=Path, help="run folder, which several ranks need; by default one that goes again")
    options = parser.parse_args()
    if options.out is None and os.environ.get("WORLD_SIZE", "1") != "1":
        parser.error("several ranks share a run folder; name a new one with --out")
    found = measure("demo" if options.quick else options.recipe, options.ds, options.out)
    if os.environ.get("RANK", "0") == "0":
        for name, value in found.items():
            print(f"{name:<22} {value:.3g}")
        write_json(options.json, found)


if __name__ == "__main__":
    main()
