"""Real runs of the training command in processes of their own: small, on CPUs, for the tests to hurt."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from data.feature_folders import write_features
from distributed.forks import Fork, prepare
from distributed.ranks import PATIENCE, environments, server_of

from re2tal.distributed import World
from re2tal.structures import Action

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
TRAIN = [sys.executable, str(ROOT / "launch" / "train.py")]


def write_both_subsets(folder: Path, *, videos: int = 8, channels: int = 12, steps: int = 20) -> Path:
    """Features of a few videos for training and for validation."""
    for number, subset in enumerate(("training", "validation")):
        generator = torch.Generator().manual_seed(number)
        values = {f"{subset}{n}": torch.randn(channels, steps + n, generator=generator) for n in range(videos)}
        write_features(folder / subset, values, actions=[Action(1.0, 3.0, "jump")], classes=("jump",))
    return folder


def small(features: Path, out: Path, *options: str, workers: int = 0) -> list[str]:
    """Options of a small run; those given win."""
    usual = ["--data.shards", str(features), "--out", str(out), "--localizer.channels", "16"]
    return [*usual, "--engine.batch-size", "1", "--data.clips.workers", str(workers), *options]


def alone() -> dict[str, str]:
    """The environment of a process that nobody has told a rank."""
    environment = {name: value for name, value in os.environ.items() if name not in World().variables()}
    return {**environment, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}


def start_ranks(commands: Sequence[Sequence[str]], logs: Sequence[Path], **environment: str) -> list[Fork]:
    """One world, a rank for each Python command; what each says is added to its log."""
    told = environments(len(commands), **environment)
    prepare([server_of(rank) for rank in range(len(commands))], told[0])
    return [
        Fork(command, server=server_of(rank), environment=told[rank], log=log)
        for rank, (command, log) in enumerate(zip(commands, logs, strict=True))
    ]


def end(processes: Sequence[subprocess.Popen | Fork]) -> None:
    """None of them outlives this."""
    for process in processes:
        process.kill()
        process.wait()


def ends_of(processes: Sequence[subprocess.Popen | Fork], log: Path, *, seconds: float = 900) -> list[int]:
    """Their exit statuses, when all have ended."""
    try:
        wait_for(lambda: None not in [process.poll() for process in processes], seconds, log)
        return [process.returncode for process in processes]
    finally:
        end(processes)


def wait_for(condition: Callable[[], bool], seconds: float, *logs: Path) -> float:
    """Seconds until it is true; AssertionError with the ends of the logs when they are over."""
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > PATIENCE * seconds:
            raise AssertionError("\n".join(f"--- {log}\n{log.read_text()[-4000:]}" for log in logs if log.exists()))
        time.sleep(0.05)
    return time.monotonic() - began
