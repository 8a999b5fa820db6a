"""Training: a network, from its configuration to a run folder with weights, detections and scores."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch

from re2tal.config import RecognitionConfig, RunConfig, flatten, save_config, to_json
from re2tal.data.building.clips import true_classes
from re2tal.data.contract.shards import FeatureSet, ShardSet, open_any, subset_folder
from re2tal.data.streaming.stream import ClipStream, stream_clips
from re2tal.distributed import World, is_main, made_by_main, refuse_differences, resolve_world, together
from re2tal.evaluation.accuracy import AccuracyReport
from re2tal.evaluation.average_precision import MapReport
from re2tal.inference import detector_input
from re2tal.options import defaults_of, names_with
from re2tal.planning.shared import PLAN_NAME, save_plan, shared_plan
from re2tal.planning.step_plan import StepPlan
from re2tal.rewire import wiring_of
from re2tal.runs.deepspeed_presets import DEFAULT_PRESET, find_preset
from re2tal.runs.demo_data import make_if_wanted
from re2tal.runs.folder import CHECKPOINTS_NAME, CONFIG_NAME, MODEL_NAME, RESULTS_NAME, SUMMARY_NAME, claim
from re2tal.runs.lock import locked
from re2tal.runs.model_folder import describe_trained
from re2tal.runs.orphans import end_with_the_launcher
from re2tal.runs.stored_features import check_kind, check_pair, describe, on_features
from re2tal.runs.tasks import AnyRun, Outcome, build_model, judge
from re2tal.strict_json import write_json
from re2tal.structures import Batch, FeatureBatch
from re2tal.training.agreement import versions, weight_checksums
from re2tal.training.annealing import beta_course
from re2tal.training.checkpoint import CheckpointStore
from re2tal.training.engine import Engine, build_engine, gather_weights, join, leave, zero_stage
from re2tal.training.export import write_model
from re2tal.training.finite import check_finite
from re2tal.training.frames import prepare_frames
from re2tal.training.generators import seed_generators
from re2tal.training.metrics import MetricsLog, peak_memory_gib
from re2tal.training.optimizer import build_optimizer
from re2tal.training.schedule import learning_rate_factor, num_optimizer_steps
from re2tal.training.trainer import Trainer
from re2tal.training.zero_file import resolve_deepspeed_config


@dataclass(frozen=True, slots=True)
class TrainedRun:
    """The outcome of `train`."""

    folder: Path
    """The run folder; `re2tal.runs.folder` names its files."""
    interrupted: bool
    """The run was told to stop, and saved a checkpoint: `train` with resume continues it."""
    summary: Mapping[str, Any]
    """The content of summary.json, on rank 0; empty on the others, and of an interrupted run."""
    report: MapReport | AccuracyReport | None = None
    """The scores of the trained network, by class, on rank 0; None on the others, and of an interrupted run."""


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
    started = time.perf_counter()
    end_with_the_launcher()
    if resume and overwrite:
        raise ValueError("resume continues the earlier run, overwrite removes it; choose one of them")
    world = resolve_world(os.environ)
    folder = Path("runs") / config.name if out is None else Path(out)
    device = join(world, config.engine)
    with ExitStack() as cleanup:
        cleanup.callback(leave)
        _same_start(config, {"out": folder.absolute(), "resume": resume, "overwrite": overwrite})
        ds_file, settings = together(lambda: _engine_settings(ds, config, world))[world.rank]
        make_if_wanted(config, world)
        training, validation = _open_both(config)
        if isinstance(config, RunConfig) and isinstance(training, FeatureSet):
            config = on_features(config, training)
        check_kind(config, training)
        _check_norms(config)
        made_by_main(lambda: cleanup.enter_context(locked(folder)))
        claim(folder, resume=resume, overwrite=overwrite)
        clips = _stream(config, validation, world, training=False)
        evaluate = partial(judge, config=config, shards=validation, clips=clips)
        earlier = folder / PLAN_NAME if resume else None
        plan = _plan(config, ds_file, world, classes=training.classes, device=device, earlier=earlier)
        trainer = _build(config, settings, folder, world, shards=training, evaluate=evaluate, device=device, plan=plan)
        resumed = resume and trainer.resume()
        if world.is_main:  # not before: a run that may not be resumed like this keeps the configuration it has
            save_config(folder / CONFIG_NAME, config)
            if plan is not None:
                save_plan(folder / PLAN_NAME, plan)
        if resumed:
            trainer.log.say(f"resumed at step {trainer.progress.step} of {trainer.num_steps}")
        with closing(trainer.log):
            if trainer.train() == "interrupted":
                return TrainedRun(folder, interrupted=True, summary={})
            return _finish(trainer, folder, evaluate, config=config, training=training, started=started)


def _same_start(config: AnyRun, options: Mapping[str, object]) -> None:
    """Every rank calls this, first of all: what differs here may send ranks to different collectives, to wait there."""
    refuse_differences({"task": type(config).__name__, **dict(flatten(to_json(config))), **options, **versions()})


def _engine_settings(ds: Path | str, config: AnyRun, world: World) -> tuple[Path, dict[str, Any]]:
    """The DeepSpeed file, and what it means for this run."""
    ds_file = find_preset(ds)
    return ds_file, resolve_deepspeed_config(ds_file, config.engine, world_size=world.world_size)


def _check_norms(config: AnyRun) -> None:
    if config.backbone.norm_eval and config.backbone.weights is None:
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
    *,
    shards: ShardSet | FeatureSet,
    evaluate: Callable[[Engine], Outcome],
    device: torch.device,
    plan: StepPlan | None,
) -> Trainer:
    seed = config.training.seed
    seed_generators(seed, rank=0)  # the same weights on all ranks
    model = build_model(config, shards.classes).to(device)
    check_finite(model)
    if plan is not None:
        plan.apply(model)
    clips = _stream(config, shards, world, training=True)
    refuse_differences(
        {
            **{f"DeepSpeed's {name}": value for name, value in flatten(settings)},
            "training shards": shards.manifest_sha256,
            "order of the first epoch": sha256(repr(clips.order(0)).encode()).hexdigest(),
            **weight_checksums(model),  # now: DeepSpeed will overwrite them with those of rank 0
        }
    )
    seed_generators(seed, rank=world.rank)  # but different paths dropped
    accumulation = config.engine.gradient_accumulation
    steps_per_epoch = clips.steps_per_epoch / accumulation
    num_steps = num_optimizer_steps(config.training.epochs, clips.steps_per_epoch, accumulation=accumulation)
    factor = learning_rate_factor(config.schedule, steps_per_epoch=steps_per_epoch, num_steps=num_steps)
    beta = beta_course(config.annealing, end=config.backbone.beta, steps_per_epoch=steps_per_epoch, num_steps=num_steps)
    engine = build_engine(model, build_optimizer(model, config.optimizer), factor=factor, settings=settings)
    free = set(names_with(config, "resumable"))
    unchangeable = {name: value for name, value in flatten(to_json(config)) if name not in free}
    identity = {
        **unchangeable,
        "number of ranks": world.world_size,
        "ZeRO stage": zero_stage(engine),
        "number of classes": len(shards.classes),
        "training shards": shards.manifest_sha256,
    }
    dtype = next(model.parameters()).dtype
    return Trainer(
        engine,
        clips,
        lambda engine: evaluate(engine).figures,
        config.training,
        prepare=partial(_prepare, strength=config.data.clips.colour_jitter, seed=seed, rank=world.rank, dtype=dtype),
        checkpoints=CheckpointStore(
            folder / CHECKPOINTS_NAME,
            identity=identity,
            defaults=dict(defaults_of(config)),
            keep=config.training.keep_checkpoints,
        ),
        log=MetricsLog(folder, enabled=world.is_main),
        beta=beta,
        planned_bytes=None if plan is None else plan.memory.peak,
    )


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


def _stream(config: AnyRun, shards: ShardSet | FeatureSet, world: World, *, training: bool) -> ClipStream:
    return stream_clips(
        shards,
        config.data.clips,
        batch_size=config.engine.batch_size,
        training=training,
        rank=world.rank,
        world_size=world.world_size,
        seed=config.training.seed,
        decoder=config.data.decoder,
        # torchrun and accelerate say it; under other launchers each rank counts for itself alone.
        ranks_on_host=int(on_host) if (on_host := os.environ.get("LOCAL_WORLD_SIZE", "")).isdecimal() else 1,
    )


def _prepare(batch: Batch, position: int, *, strength: float, seed: int, rank: int, dtype: torch.dtype) -> torch.Tensor:
    """Colours and normalises on the device; draws by the place in the run alone, so a resumed run repeats it."""
    if isinstance(batch, FeatureBatch):
        return detector_input(batch, dtype=dtype)
    mixed = np.random.SeedSequence([seed, rank, position]).generate_state(1, np.uint64)
    generator = torch.Generator().manual_seed(int(mixed[0]))
    return prepare_frames(batch.frames, strength=strength, generator=generator, dtype=dtype)


def _finish(
    trainer: Trainer,
    folder: Path,
    evaluate: Callable[[Engine], Outcome],
    *,
    config: AnyRun,
    training: ShardSet | FeatureSet,
    started: float,
) -> TrainedRun:
    """Every rank calls this: evaluates and exports the trained model; rank 0 writes."""
    with trainer.averaged_weights():
        outcome = evaluate(trainer.engine)
        weights = gather_weights(trainer.engine)
    trainer.log.write("evaluation", outcome.figures, step=trainer.progress.step)
    if not is_main():
        return TrainedRun(folder, interrupted=False, summary={})
    model = trainer.engine.module
    features = describe(training) if isinstance(training, FeatureSet) else None
    write_model(folder / MODEL_NAME, weights, classes=model.classes, wiring=wiring_of(model), features=features)
    outcome.write(folder / RESULTS_NAME)
    summary = {
        **outcome.summary,
        "steps": trainer.progress.step,
        "skipped": trainer.progress.skipped,
        "train_seconds": round(trainer.progress.seconds, 1),
        "total_seconds": round(time.perf_counter() - started, 1),
        "peak_memory_gib": round(peak_memory_gib(trainer.engine.device), 2),
        "ranks": int(trainer.engine.world_size),
    }
    write_json(folder / SUMMARY_NAME, summary)
    if isinstance(config, RunConfig):
        describe_trained(folder, config, model.classes, summary=summary, training=training)
    return TrainedRun(folder, interrupted=False, summary=summary, report=outcome.report)
