"""Training: a network, from its configuration to a run folder with weights, detections and scores."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import nn

from re2tal.config import RecognitionConfig, RunConfig, flatten, save_config, to_json
from re2tal.data.building.clips import true_classes
from re2tal.data.contract.shards import FeatureSet, ShardSet, open_any, subset_folder
from re2tal.distributed import World, is_main, made_by_main, refuse_differences, resolve_world, together
from re2tal.options import defaults_of, names_with
from re2tal.planning.shared import PLAN_NAME, save_plan, shared_plan
from re2tal.planning.step_plan import StepPlan
from re2tal.runs.clip_memory import approximation, forget_clips, remembering_clips
from re2tal.runs.deepspeed_presets import DEFAULT_PRESET, find_preset
from re2tal.runs.demo_data import make_if_wanted
from re2tal.runs.exit_status import HUNG
from re2tal.runs.folder import CHECKPOINTS_NAME, CONFIG_NAME, claim
from re2tal.runs.lock import locked
from re2tal.runs.model_folder import describe_trained
from re2tal.runs.orphans import end_with_the_launcher
from re2tal.runs.start import build_from, find_start
from re2tal.runs.stored_features import check_kind, check_pair, describe, on_features
from re2tal.runs.tasks import AnyRun, Outcome, judge
from re2tal.runs.training_data import alike_on_any_ranks, prepare, say_shared, stream_of
from re2tal.runs.training_end import TrainedRun, finish
from re2tal.training.agreement import versions, weight_checksums
from re2tal.training.annealing import beta_course
from re2tal.training.checkpoint import VALIDATION, CheckpointStore
from re2tal.training.elastic import RANKS, same_clips_per_step
from re2tal.training.engine import Engine, build_engine, join, leave, zero_stage
from re2tal.training.finite import check_finite
from re2tal.training.generators import seed_generators
from re2tal.training.interruption import Agreement, Interrupted
from re2tal.training.metrics import MetricsLog
from re2tal.training.optimizer import build_optimizer, for_batch
from re2tal.training.schedule import learning_rate_factor, num_optimizer_steps
from re2tal.training.sharding import is_sharded_early
from re2tal.training.signals import StopRequests, stop_requests
from re2tal.training.trainer import Prepare, Trainer
from re2tal.training.watchdog import at, watched
from re2tal.training.zero_file import resolve_deepspeed_config

STEPS_OF_EPOCH = "optimizer steps of an epoch"
"""In the identity of a run. The same for any number of ranks."""
Pair = tuple[ShardSet | FeatureSet, ShardSet | FeatureSet]  # training, validation


def train(
    config: AnyRun,
    *,
    ds: Path | str = DEFAULT_PRESET,
    out: Path | str | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> TrainedRun:
    """Train a detector, or a recognizer, and evaluate it on the validation subset. Every rank calls this.

    Args:
        config: the whole configuration
        ds: ZeRO stage, offload, communication: a preset, such as zero2, or a DeepSpeed file
        out: run folder; runs/NAME by default
        resume: continue from the newest sound checkpoint in the run folder, or start if there is none
        overwrite: remove what an earlier run left in the run folder

    Example:
        config = re2tal.find_recipe("demo")
        trained = re2tal.train(config, out="runs/demo")
        print(trained.summary["average_map"])
    """
    if resume and overwrite:
        raise ValueError("resume continues the earlier run, overwrite removes it; choose one of them")
    folder = Path("runs") / config.name if out is None else Path(out)
    with ExitStack() as cleanup:
        requests = cleanup.enter_context(stop_requests())
        end_with_the_launcher()
        try:
            return _train(config, folder, requests, cleanup, ds=ds, resume=resume, overwrite=overwrite)
        except Interrupted:
            if is_main():
                print(f"stopped as told; go on with --resume (run folder {folder})", file=sys.stderr, flush=True)
            return TrainedRun(folder, interrupted=True, summary={})


def _train(
    config: AnyRun,
    folder: Path,
    requests: StopRequests,
    cleanup: ExitStack,
    *,
    ds: Path | str,
    resume: bool,
    overwrite: bool,
) -> TrainedRun:
    """Interrupted on all ranks when one was told to stop. `cleanup` unwinds when this is over."""
    started = time.perf_counter()
    world = resolve_world(os.environ)
    device = join(world, config.engine)
    cleanup.callback(leave)
    ranks = Agreement(requests, device)
    at("start-up", patient=True)
    watch = watched(
        folder,
        limit_seconds=60 * config.engine.timeout_minutes,
        master_addr=world.master_addr,
        exit_status=HUNG,
    )
    cleanup.enter_context(watch)
    _same_start(config, {"out": folder.absolute(), "resume": resume, "overwrite": overwrite})
    ranks.check()
    ds_file, settings = together(lambda: _engine_settings(ds, config, world))[world.rank]
    make_if_wanted(config, world)
    both = training, validation = _open_both(config)
    if isinstance(config, RunConfig) and isinstance(training, FeatureSet):
        config = on_features(config, training)
    check_kind(config, training)
    _check_norms(config)
    build = partial(build_from, config, training.classes, find_start(config, training))
    made_by_main(lambda: cleanup.enter_context(locked(folder)))
    claim(folder, resume=resume, overwrite=overwrite)
    if resume and (saved := made_by_main(CheckpointStore(folder / CHECKPOINTS_NAME, identity={}).newest_run)):
        config = replace(config, engine=same_clips_per_step(config.engine, saved, num_ranks=world.world_size))
        ds_file, settings = together(lambda: _engine_settings(ds, config, world))[world.rank]
    ranks.check()
    clips = stream_of(config, validation, world, training=False)

    def evaluate(engine: Engine) -> Outcome:
        return judge(engine, config=config, shards=validation, batches=ranks.between(clips.epoch(0)))

    earlier = folder / PLAN_NAME if resume else None
    plan = _plan(config, ds_file, world, classes=training.classes, device=device, earlier=earlier)
    ranks.check()
    trainer = _build(config, settings, folder, world, build, both, evaluate=evaluate, device=device, plan=plan)
    resumed = resume and trainer.resume()
    if not resumed:
        forget_clips(folder)
    if world.is_main:  # not before: a run that may not be resumed like this keeps the configuration it has
        save_config(folder / CONFIG_NAME, config)
        if plan is not None:
            save_plan(folder / PLAN_NAME, plan)
    if resumed:
        trainer.log.say(f"resumed at step {trainer.progress.step} of {trainer.num_steps}")
    with closing(trainer.log):
        if trainer.train() == "interrupted":
            raise Interrupted
        features = describe(training) if isinstance(training, FeatureSet) else None

        def describe_run(summary: Mapping[str, Any]) -> None:
            if isinstance(config, RunConfig):
                describe_trained(folder, config, trainer.engine.module.classes, summary=summary, training=training)

        return finish(
            trainer, folder, evaluate, ranks=ranks, features=features, describe_run=describe_run, started=started
        )


def _same_start(config: AnyRun, options: Mapping[str, object]) -> None:
    """Every rank calls this, first of all: what differs here may send ranks to different collectives, to wait there."""
    refuse_differences({"task": type(config).__name__, **dict(flatten(to_json(config))), **options, **versions()})


def _engine_settings(ds: Path | str, config: AnyRun, world: World) -> tuple[Path, dict[str, Any]]:
    """The DeepSpeed file, and what it means for this run."""
    ds_file = find_preset(ds)
    return ds_file, resolve_deepspeed_config(ds_file, config.engine, world_size=world.world_size)


def _check_norms(config: AnyRun) -> None:
    if config.backbone.norm_eval and config.backbone.weights is None and config.start_from is None:
        raise ValueError(
            "backbone.norm_eval freezes the norms of a pretrained backbone, but backbone.weights names no weights; "
            "set it to a weights file, or set backbone.norm_eval to false to train from random weights"
        )


def _open_both(config: AnyRun) -> tuple[ShardSet, ShardSet] | tuple[FeatureSet, FeatureSet]:
    """The training and the validation subset: both of videos, or, for a detector, both of the same features."""
    data = config.data
    training = open_any(subset_folder(data.shards, data.training_subset))
    validation = open_any(subset_folder(data.shards, data.validation_subset))
    if training.classes != validation.classes:
        raise ValueError(
            f"{training.root} has classes {list(training.classes)}, {validation.root} {list(validation.classes)}; "
            "build both from one annotation file"
        )
    if is_main():
        say_shared(training, validation)
    match training, validation:
        case ShardSet(), ShardSet():
            if isinstance(config, RecognitionConfig):
                for shards in (training, validation):
                    true_classes(shards)  # refuses those that are not trimmed clips
            return training, validation
        case FeatureSet(), FeatureSet():
            check_pair(training, validation)
            return training, validation
    raise ValueError(f"one of {training.root} and {validation.root} holds videos, the other features; give two alike")


def _build(
    config: AnyRun,
    settings: dict[str, Any],
    folder: Path,
    world: World,
    build: Callable[[], nn.Module],
    shards: Pair,
    *,
    evaluate: Callable[[Engine], Outcome],
    device: torch.device,
    plan: StepPlan | None,
) -> Trainer:
    training, validation = shards
    seed = config.training.seed
    seed_generators(seed, rank=0)  # the same weights on all ranks
    model = build()
    if not is_sharded_early(settings):  # there, parameters go to the device one by one
        model = model.to(device)
    check_finite(model)
    if plan is not None:
        plan.apply(model)
    clips = stream_of(config, training, world, training=True)
    accumulation = config.engine.gradient_accumulation
    # Earlier versions began a step with the last batches of one epoch and ended it with the first of the next.
    earlier = {STEPS_OF_EPOCH: clips.steps_per_epoch / accumulation}
    begin_step = alike_on_any_ranks(model, clips, accumulation=accumulation)
    refuse_differences(
        {
            **{f"DeepSpeed's {name}": value for name, value in flatten(settings)},
            "training shards": training.manifest_sha256,
            VALIDATION: validation.manifest_sha256,
            "order of the first epoch": sha256(repr(clips.order(0)).encode()).hexdigest(),
            **weight_checksums(model),  # now: DeepSpeed will overwrite them with those of rank 0
        }
    )
    seed_generators(seed, rank=world.rank)  # but different paths dropped
    steps_per_epoch = clips.steps_per_epoch / accumulation
    num_steps = num_optimizer_steps(config.training.epochs, clips.steps_per_epoch, accumulation=accumulation)
    factor = learning_rate_factor(config.schedule, steps_per_epoch=steps_per_epoch, num_steps=num_steps)
    beta = beta_course(config.annealing, end=config.backbone.beta, steps_per_epoch=steps_per_epoch, num_steps=num_steps)
    clips_per_step = config.engine.batch_size * accumulation * world.world_size
    optimizer, on_rates = for_batch(config.optimizer, clips=clips_per_step)
    engine = build_engine(model, build_optimizer(model, optimizer), factor=factor, settings=settings)
    identity = _identity(config, engine, shards, world) | {STEPS_OF_EPOCH: steps_per_epoch}
    dtype = next(model.parameters()).dtype
    log = MetricsLog(folder, enabled=world.is_main)
    if on_rates is not None:
        log.say(on_rates)
    prepared: Prepare = partial(prepare, strength=config.data.clips.colour_jitter, seed=seed, world=world, dtype=dtype)
    if config.backbone.trained_clips < 1:
        prepared = remembering_clips(
            prepared, model.get_submodule("backbone"), folder, config.backbone.trained_clips, seed=seed, world=world
        )
        log.say(approximation(config.backbone.trained_clips))
    return Trainer(
        engine,
        clips,
        lambda engine: evaluate(engine).figures,
        config.training,
        prepare=prepared,
        checkpoints=CheckpointStore(
            folder / CHECKPOINTS_NAME,
            identity=identity,
            free=set(names_with(config, "resumable")),
            defaults=dict(defaults_of(config)) | earlier,
            keep=config.training.keep_checkpoints,
        ),
        log=log,
        beta=beta,
        planned_bytes=None if plan is None else plan.memory.peak,
        new_step=begin_step,
    )


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


def _plan(
    config: AnyRun, ds: Path, world: World, *, classes: Sequence[str], device: torch.device, earlier: Path | None
) -> StepPlan | None:
    """Every rank calls this: how the backbone's stages run to keep within the budget, if there is one; rank 0 says it.

    None without a budget. `earlier`: the file of the plan that a resumed run goes on with.
    """
    if config.engine.memory_budget_gb is None:
        return None
    plan = shared_plan(
        config, ds, world_size=world.world_size, num_classes=len(classes), device=device, earlier=earlier
    )
    if world.is_main:
        print(plan, file=sys.stderr, flush=True)
    return plan
