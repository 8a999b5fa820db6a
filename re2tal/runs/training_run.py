"""Training: a network, from its configuration to a run folder with weights, detections and scores."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from re2tal.config import AnyRun, RunConfig, flatten, save_config, to_json
from re2tal.data.contract.shards import FeatureSet, ShardSet
from re2tal.distributed import World, is_main, made_by_main, refuse_differences, resolve_world, together
from re2tal.planning.shared import save_plan, shared_plan
from re2tal.planning.step_plan import StepPlan
from re2tal.runs.best import BestModel
from re2tal.runs.clip_memory import forget_clips
from re2tal.runs.deepspeed_presets import DEFAULT_PRESET, find_preset
from re2tal.runs.demo_data import make_if_wanted
from re2tal.runs.evaluation import check_truths
from re2tal.runs.exit_status import HUNG
from re2tal.runs.folder import BEST_NAME, CHECKPOINTS_NAME, CONFIG_NAME, METRICS_NAME, PLAN_NAME, claim
from re2tal.runs.lock import locked
from re2tal.runs.orphans import end_with_the_launcher
from re2tal.runs.start import build_from, find_start, without_gone_files
from re2tal.runs.stored_features import check_kind, on_features
from re2tal.runs.tasks import Outcome, judge
from re2tal.runs.training_build import build_trainer
from re2tal.runs.training_data import open_both, stream_of
from re2tal.runs.training_end import TrainedRun, finish
from re2tal.training.agreement import versions
from re2tal.training.checkpoint import CheckpointStore
from re2tal.training.deepspeed_import import Engine
from re2tal.training.elastic import same_clips_per_step
from re2tal.training.interruption import Interrupted, StopVote
from re2tal.training.manifest import complete_checkpoints
from re2tal.training.metrics import MetricsLog
from re2tal.training.process_group import join, leave
from re2tal.training.signals import StopRequests, stop_requests
from re2tal.training.trackers import check_trackers
from re2tal.training.trainer import Trainer
from re2tal.training.watchdog import at, watched
from re2tal.training.zero_file import resolve_deepspeed_config


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
    world, device = _join(config, folder, cleanup)
    ranks = StopVote(requests, device)
    _same_start(config, {"out": folder.absolute(), "resume": resume, "overwrite": overwrite})
    ranks.check()
    together(lambda: _engine_settings(ds, config, world))  # a fault of the file is said before data is opened
    made_by_main(lambda: check_trackers(config.training.trackers))
    make_if_wanted(config, world)
    shards = training, validation = open_both(config)
    config = _fitted(config, training, validation)
    goes_on = resume and made_by_main(lambda: bool(complete_checkpoints(folder / CHECKPOINTS_NAME)))
    begun = without_gone_files(config) if goes_on else config
    start = find_start(begun, training)
    build = partial(build_from, begun, training.classes, start)
    # Before anything is removed or written in the folder.
    made_by_main(lambda: cleanup.enter_context(locked(folder)))
    start_files = [Path(one) for one in (start, config.backbone.weights) if one is not None]
    claim(folder, resume=resume, overwrite=overwrite, start=start_files)
    if resume:
        config = _on_these_ranks(config, folder, world)
    ds_file, settings = together(lambda: _engine_settings(ds, config, world))[world.rank]
    ranks.check()
    # Before training: a fault in the validation data must not show after days.
    clips = stream_of(config, validation, world, training=False)

    def evaluate(engine: Engine) -> Outcome:
        return judge(engine, config=config, shards=validation, batches=ranks.between(clips.epoch(0)))

    earlier = folder / PLAN_NAME if resume else None
    plan = _plan(config, ds_file, world, classes=training.classes, device=device, earlier=earlier)
    ranks.check()
    best = BestModel(folder / BEST_NAME, config, *shards) if config.training.keep_best else None
    trainer = build_trainer(
        config, settings, folder, world, build, shards, evaluate=evaluate, best=best, device=device, plan=plan
    )
    resumed = _resume(trainer, config, folder, plan, best, resume=resume)
    assert resumed or not goes_on, "it may be built without the weights that it began with"
    with _closed_together(trainer.log):
        if trainer.train() == "interrupted":
            raise Interrupted
        return finish(trainer, config, folder, training, evaluate, ranks=ranks, started=started, best=best)


@contextmanager
def _closed_together(log: MetricsLog) -> Iterator[None]:
    """Every rank enters this; they leave it together, but for errors: a tracker may take minutes to end, and launchers
    such as srun kill a rank that is still there long after the others."""
    with closing(log):
        try:
            yield
        except Interrupted:  # on all ranks
            _close(log)
            raise
        _close(log)


def _close(log: MetricsLog) -> None:
    at("the end of its trackers", patient=True)
    made_by_main(log.close)


def _join(config: AnyRun, folder: Path, cleanup: ExitStack) -> tuple[World, torch.device]:
    """The ranks meet, and are watched from here on."""
    world = resolve_world(os.environ)
    device = join(world, config.engine)
    cleanup.callback(leave)
    at("start-up", patient=True)
    limit = 60 * config.engine.timeout_minutes
    watch = watched(folder, limit_seconds=limit, master_addr=world.master_addr, exit_status=HUNG)
    cleanup.enter_context(watch)
    return world, device


def _fitted(config: AnyRun, training: ShardSet | FeatureSet, validation: ShardSet | FeatureSet) -> AnyRun:
    """`config` with what the data decides. ValueError where it does not fit the data, or itself."""
    if isinstance(config, RunConfig) and isinstance(training, FeatureSet):
        config = on_features(config, training)
    check_kind(config, training)
    if config.backbone.norm_eval and config.backbone.weights is None and config.start_from is None:
        raise ValueError(
            "backbone.norm_eval freezes the norms of a pretrained backbone, but backbone.weights names no weights; "
            "set it to a weights file, or set backbone.norm_eval to false to train from random weights"
        )
    if isinstance(config, RunConfig):
        # Not when training is over: a subset without actions, a list of blocked videos that is none.
        check_truths([video.record for video in validation.videos], config, classes=training.classes)
    return config


def _on_these_ranks(config: AnyRun, folder: Path, world: World) -> AnyRun:
    """Every rank calls this: `config` with as many clips per step as the run that is resumed."""
    saved = made_by_main(CheckpointStore(folder / CHECKPOINTS_NAME, identity={}).newest_run)
    if not saved:
        return config
    engine = same_clips_per_step(config.engine, saved, num_ranks=world.world_size)
    if world.is_main and engine != config.engine:
        print(
            f"engine.gradient_accumulation is {engine.gradient_accumulation} and not "
            f"{config.engine.gradient_accumulation}: on {world.world_size} ranks a step takes as many clips as before",
            file=sys.stderr,
            flush=True,
        )
    return replace(config, engine=engine)


def _resume(
    trainer: Trainer, config: AnyRun, folder: Path, plan: StepPlan | None, best: BestModel | None, *, resume: bool
) -> bool:
    """Every rank calls this: continues the earlier run, if `resume` and there is one; rank 0 writes config and plan.

    Whether there was one.
    """
    resumed = resume and trainer.resume()
    if not resumed:
        forget_clips(folder)
    if best is not None:
        best.start(step=trainer.progress.step, say=trainer.log.say)
    if is_main():  # not before: a run that may not be resumed like this keeps the configuration it has
        save_config(folder / CONFIG_NAME, config)
        if plan is not None:
            save_plan(folder / PLAN_NAME, plan)
    start = "resumed at" if resumed else "beginning with"
    said = f"{start} step {trainer.progress.step} of {trainer.num_steps}; figures go to {folder / METRICS_NAME}"
    trainer.log.say(said)
    return resumed


def _same_start(config: AnyRun, options: Mapping[str, object]) -> None:
    """Every rank calls this, first of all: what differs here may send ranks to different collectives, to wait there."""
    refuse_differences({"task": type(config).__name__, **dict(flatten(to_json(config))), **options, **versions()})


def _engine_settings(ds: Path | str, config: AnyRun, world: World) -> tuple[Path, dict[str, Any]]:
    """The DeepSpeed file, and what it means for this run."""
    ds_file = find_preset(ds)
    return ds_file, resolve_deepspeed_config(ds_file, config.engine, world_size=world.world_size)


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
