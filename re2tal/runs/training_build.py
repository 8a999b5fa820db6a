"""The trainer of a run: its network, its engine, and the identity that its checkpoints carry."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any
from weakref import ref

import torch
from torch import nn

from re2tal.config import AnyRun, flatten, to_json
from re2tal.data.streaming.stream import ClipStream
from re2tal.distributed import World, refuse_differences
from re2tal.options import defaults_of, names_with
from re2tal.planning.step_plan import StepPlan
from re2tal.runs.best import BestModel
from re2tal.runs.clip_memory import approximation, remembering_clips
from re2tal.runs.folder import CHECKPOINTS_NAME
from re2tal.runs.tasks import Outcome
from re2tal.runs.training_data import Pair, alike_on_any_ranks, prepare, stream_of
from re2tal.training.agreement import weight_checksums
from re2tal.training.annealing import beta_course
from re2tal.training.checkpoint import CheckpointStore
from re2tal.training.deepspeed_import import Engine
from re2tal.training.elastic import RANKS
from re2tal.training.ema import about_short_run
from re2tal.training.engine import build_engine
from re2tal.training.engine_weights import zero_stage
from re2tal.training.finite import check_finite
from re2tal.training.generators import seed_generators
from re2tal.training.identity import VALIDATION
from re2tal.training.metrics import MetricsLog
from re2tal.training.optimizer import build_optimizer, for_batch
from re2tal.training.schedule import learning_rate_factor, num_optimizer_steps
from re2tal.training.sharding import is_sharded_early
from re2tal.training.trackers import Trackers
from re2tal.training.trainer import Prepare, Trainer

STEPS_OF_EPOCH = "optimizer steps of an epoch"
"""In the identity of a run. The same for any number of ranks."""


def build_trainer(
    config: AnyRun,
    settings: dict[str, Any],
    folder: Path,
    world: World,
    build: Callable[[], nn.Module],
    shards: Pair,
    *,
    evaluate: Callable[[Engine], Outcome],
    best: BestModel | None,
    device: torch.device,
    plan: StepPlan | None,
) -> Trainer:
    """Every rank calls this. ValueError on all of them where settings, data or initial weights differ."""
    accumulation = config.engine.gradient_accumulation
    model = _network(config, settings, build, device=device, plan=plan)
    clips = stream_of(config, shards[0], world, training=True)
    # Earlier versions began a step with the last batches of one epoch and ended it with the first of the next.
    earlier = {STEPS_OF_EPOCH: clips.steps_per_epoch / accumulation}
    begin_step = alike_on_any_ranks(model, clips, accumulation=accumulation)
    _refuse_other_starts(model, settings, shards, clips)
    shown = dict(flatten(to_json(config)))
    trackers = Trackers(config.training.trackers, folder, run_name=config.name, config=shown)
    log = MetricsLog(folder, enabled=world.is_main, trackers=trackers)
    engine, beta = _engine(config, settings, model, clips, world, log)
    identity = _identity(config, engine, shards, world)

    def validate(engine: Engine) -> Mapping[str, float]:
        outcome, now = evaluate(engine), ours()
        assert now is not None
        log.draw(outcome.pictures)
        # Before the end of annealing it is another network than that of config.json.
        if best is not None and now.is_annealed:
            best.offer(outcome, engine, step=now.progress.step)
        return outcome.figures

    trainer = Trainer(
        engine,
        clips,
        validate,
        config.training,
        prepare=_prepare(config, model, folder, world, log),
        checkpoints=CheckpointStore(
            folder / CHECKPOINTS_NAME,
            identity=identity | {STEPS_OF_EPOCH: clips.steps_per_epoch / accumulation},
            free=set(names_with(config, "resumable")),
            defaults=dict(defaults_of(config)) | earlier,
            keep=config.training.keep_checkpoints,
        ),
        log=log,
        beta=beta,
        planned_bytes=None if plan is None else plan.memory.peak,
        new_step=begin_step,
    )
    ours = ref(trainer)  # a circle would keep the loader's processes alive when the run is over
    return trainer


def _network(
    config: AnyRun,
    settings: Mapping[str, Any],
    build: Callable[[], nn.Module],
    *,
    device: torch.device,
    plan: StepPlan | None,
) -> nn.Module:
    seed_generators(config.training.seed)  # the same weights on all ranks
    model = build()
    if not is_sharded_early(settings):  # there, parameters go to the device one by one
        model = model.to(device)
    check_finite(model)
    if plan is not None:
        plan.apply(model)
    return model


def _refuse_other_starts(model: nn.Module, settings: dict[str, Any], shards: Pair, clips: ClipStream) -> None:
    training, validation = shards
    refuse_differences(
        {
            **{f"DeepSpeed's {name}": value for name, value in flatten(settings)},
            "training shards": training.manifest_sha256,
            VALIDATION: validation.manifest_sha256,
            "order of the first epoch": sha256(repr(clips.order(0)).encode()).hexdigest(),
            **weight_checksums(model),  # now: DeepSpeed will overwrite them with those of rank 0
        }
    )


def _engine(
    config: AnyRun, settings: dict[str, Any], model: nn.Module, clips: ClipStream, world: World, log: MetricsLog
) -> tuple[Engine, Callable[[int], float] | None]:
    """And the course of beta, where it changes."""
    accumulation = config.engine.gradient_accumulation
    steps_per_epoch = clips.steps_per_epoch / accumulation
    num_steps = num_optimizer_steps(config.training.epochs, clips.steps_per_epoch, accumulation=accumulation)
    factor = learning_rate_factor(config.schedule, steps_per_epoch=steps_per_epoch, num_steps=num_steps)
    beta = beta_course(config.annealing, end=config.backbone.beta, steps_per_epoch=steps_per_epoch, num_steps=num_steps)
    clips_per_step = config.engine.batch_size * accumulation * world.world_size
    optimizer, on_rates = for_batch(config.optimizer, clips=clips_per_step)
    engine = build_engine(model, build_optimizer(model, optimizer), factor=factor, settings=settings)
    for sentence in (on_rates, about_short_run(config.training.average_decay, num_steps=num_steps)):
        if sentence is not None:
            log.say(sentence)
    return engine, beta


def _prepare(config: AnyRun, model: nn.Module, folder: Path, world: World, log: MetricsLog) -> Prepare:
    """What makes a batch ready for the network, and says so where that is an approximation."""
    seed, dtype = config.training.seed, next(model.parameters()).dtype
    prepared: Prepare = partial(prepare, strength=config.data.clips.colour_jitter, seed=seed, world=world, dtype=dtype)
    if (share := config.backbone.trained_clips) == 1:
        return prepared
    log.say(approximation(share))
    return remembering_clips(prepared, model.get_submodule("backbone"), folder, share, seed=seed, world=world)


def _identity(config: AnyRun, engine: Engine, shards: Pair, world: World) -> dict[str, Any]:
    """What a checkpoint says of its run, by name; a run that resumes it has the same, but for what is resumable."""
    training, validation = shards
    return {
        **dict(flatten(to_json(config))),
        RANKS: world.world_size,
        "ZeRO stage": zero_stage(engine),
        "number of classes": len(training.classes),
        "training shards": training.manifest_sha256,
        VALIDATION: validation.manifest_sha256,
    }
