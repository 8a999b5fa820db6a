"""A detector of a few hundred weights and a stream of made-up clips: what the trainer needs and nothing else."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from re2tal.distributed import resolve_world
from re2tal.rewire import Branch, RewiringConfig, residual_branches, rewire
from re2tal.structures import ClipBatch, Timeline
from re2tal.training.checkpoint import CheckpointStore
from re2tal.training.config import EngineConfig, TrainingConfig
from re2tal.training.engine import build_engine
from re2tal.training.engine_weights import gather_weights
from re2tal.training.generators import seed_generators
from re2tal.training.metrics import MetricsLog
from re2tal.training.optimizer import OptimizerConfig, build_optimizer
from re2tal.training.process_group import join
from re2tal.training.schedule import ScheduleConfig, learning_rate_factor
from re2tal.training.trainer import Trainer
from re2tal.training.zero_file import resolve_deepspeed_config

FRAMES = 8


class Scores(NamedTuple):
    values: Tensor
    """(B, T)"""
    mask: Tensor
    """(B, T) bool"""


class TinyDetector(nn.Module):
    """Learns how bright each frame is; drops out, and counts its forwards in a buffer that differs between ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(48, 24), nn.LayerNorm(24), nn.GELU(), nn.Dropout(0.2))
        self.localizer = nn.Linear(24, 1)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, frames: Tensor, mask: Tensor) -> Scores:
        if self.training:
            self.seen += frames.float().nan_to_num().mean()
        return Scores(self.localizer(self.backbone(frames.transpose(1, 2).flatten(2)))[..., 0], mask)

    def loss(self, outputs: Scores, actions, timelines: list[Timeline], *, num_frames: int) -> dict[str, Tensor]:
        wanted = torch.tensor([timeline.start_seconds for timeline in timelines], device=outputs.values.device)
        error = ((outputs.values - wanted[:, None]) ** 2 * outputs.mask).mean()
        return {"error": error, "total": error * (1 + 1e-3 * self.seen.float())}


class TinyBlock(nn.Module):
    """x + f(x)."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.LayerNorm(24), nn.Linear(24, 24), nn.GELU(), nn.Dropout(0.2))

    def branch(self, x: Tensor) -> Tensor:
        return self.f(x)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


@residual_branches.register
def _(block: TinyBlock) -> tuple[Branch, ...]:
    return (Branch("f", TinyBlock.branch),)


class RewiredTinyDetector(TinyDetector):
    """With six residual blocks, rewired, and watched in every second forward."""

    def __init__(self) -> None:
        super().__init__()
        blocks = nn.Sequential(*(TinyBlock() for _ in range(6)))
        self.backbone = nn.Sequential(nn.Linear(48, 24), blocks, nn.LayerNorm(24))
        rewire(self, config=RewiringConfig(monitor_every=2))


class TinyClips:
    """`steps_per_epoch` batches, each a pure function of (epoch, step, rank).

    `poison` names (epoch, step, rank)s of NaN.
    """

    def __init__(
        self, *, steps_per_epoch: int = 4, batch_size: int = 2, rank: int = 0, poison=(), on_batch=None
    ) -> None:
        self.steps_per_epoch = steps_per_epoch
        self.batch_size = batch_size
        self.rank = rank
        self.poison = [tuple(place) for place in poison]
        self.on_batch = on_batch

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[ClipBatch]:
        for step in range(start_step, self.steps_per_epoch):
            if self.on_batch:
                self.on_batch(epoch, step)
            yield self.batch(epoch, step)

    def batch(self, epoch: int, step: int) -> ClipBatch:
        generator = torch.Generator().manual_seed(1_000 * epoch + 10 * step + self.rank)
        size = self.batch_size
        frames = torch.randint(0, 256, (size, 3, FRAMES, 4, 4), generator=generator, dtype=torch.uint8)
        if (epoch, step, self.rank) in self.poison:
            frames = torch.zeros_like(frames)
        return ClipBatch(
            frames=frames,
            frame_mask=torch.ones(size, FRAMES, dtype=torch.bool),
            actions=((),) * size,
            timelines=tuple(Timeline(float(frame.float().mean()) / 255, 0.1, 9.0) for frame in frames),
            video_ids=tuple(f"video{epoch}_{step}_{clip}" for clip in range(size)),
            window_ids=(0,) * size,
            valid=torch.ones(size, dtype=torch.bool),
        )


def tiny_trainer(
    folder: str | Path,
    *,
    stage: int = 0,
    zero: dict | None = None,
    settings: Mapping[str, Any] | None = None,
    precision: str = "fp32",
    accumulation: int = 1,
    training: TrainingConfig | None = None,
    poison=(),
    on_batch=None,
    validate=lambda engine: {"average_map": 0.5},
    build: Callable[[], TinyDetector] = TinyDetector,
    beta: Callable[[int], float] | None = None,
    schedule: ScheduleConfig | None = None,
    learning_rate: float = 1e-2,
    values: Mapping[str, Any] | None = None,
    free: Sequence[str] = (),
) -> Trainer:
    """A trainer in this process, which joins the world its environment describes.

    `settings` are more of the DeepSpeed file.
    The schedule spans `training.epochs` where it is given, else 2 epochs. `values` belong to the run's identity, those
    in `free` may change.
    """
    world = resolve_world(os.environ)
    config = EngineConfig(batch_size=2, gradient_accumulation=accumulation, precision=precision, timeout_minutes=1)
    training = training or TrainingConfig(epochs=2, checkpoint_every_steps=3, log_every_steps=1)
    device = join(world, config)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    ds = folder / f"ds{world.rank}.json"
    content = {"zero_optimization": zero or {"stage": stage}, "bf16": {"enabled": "auto"}, **(settings or {})}
    ds.write_text(json.dumps(content))
    seed_generators(3)
    model = build().to(device)
    clips = TinyClips(rank=world.rank, poison=poison, on_batch=on_batch)
    factor = learning_rate_factor(
        schedule or ScheduleConfig(warmup_epochs=0.5),
        steps_per_epoch=4 / accumulation,
        num_steps=4 * (training.epochs if schedule else 2) // accumulation,
    )
    engine = build_engine(
        model,
        build_optimizer(model, OptimizerConfig(learning_rate=learning_rate, backbone_learning_rate=1e-2)),
        factor=factor,
        settings=resolve_deepspeed_config(ds, config, world_size=world.world_size),
    )

    def prepare(batch: ClipBatch, position: int) -> Tensor:
        frames = batch.frames.float() / 255
        if not batch.frames.any():
            frames = frames * torch.nan
        return frames.to(next(engine.module.parameters()).dtype)

    return Trainer(
        engine,
        clips,
        validate,
        training,
        prepare=prepare,
        checkpoints=CheckpointStore(
            folder / "checkpoints",
            identity={"world_size": world.world_size, "zero_stage": stage, "seed": training.seed, **(values or {})},
            free=free,
            keep=training.keep_checkpoints,
        ),
        log=MetricsLog(folder, enabled=world.is_main),
        beta=beta,
    )


def weights(trainer: Trainer) -> dict[str, Tensor]:
    """Every rank calls this; rank 0 gets copies of all weights."""
    return {name: value.clone() for name, value in gather_weights(trainer.engine).items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
