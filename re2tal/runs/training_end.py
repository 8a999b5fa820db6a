"""The end of a training run: the trained network is evaluated and written into the run folder."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from re2tal.config import AnyRun
from re2tal.data.contract.shards import FeatureSet, ShardSet
from re2tal.distributed import is_main, made_by_main
from re2tal.evaluation.accuracy import AccuracyReport
from re2tal.evaluation.average_precision import MapReport
from re2tal.runs.best import BestModel
from re2tal.runs.clip_memory import approximation
from re2tal.runs.folder import LAST_MODEL_NAME, MODEL_NAME, RESULTS_NAME, SUMMARY_NAME
from re2tal.runs.model_folder import describe_trained
from re2tal.runs.stored_features import describe
from re2tal.runs.tasks import Outcome
from re2tal.strict_json import write_json
from re2tal.training.deepspeed_import import Engine
from re2tal.training.engine_weights import gather_weights
from re2tal.training.export import facts_of, write_model
from re2tal.training.interruption import StopVote
from re2tal.training.metrics import peak_memory_gib
from re2tal.training.trainer import Trainer
from re2tal.training.watchdog import at


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


def finish(
    trainer: Trainer,
    config: AnyRun,
    folder: Path,
    training: ShardSet | FeatureSet,
    evaluate: Callable[[Engine], Outcome],
    *,
    ranks: StopVote,
    started: float,
    best: BestModel | None = None,
) -> TrainedRun:
    """Every rank calls this: evaluates and exports the trained model; rank 0 writes, and describes the run.

    With `best`, the model is that of the best evaluation, and the trained one lies beside it. Interrupted on all ranks
    when one was told to stop before the last file; all of it is done again after a resume.
    """
    ranks.check()
    with trainer.averaged_weights():
        outcome = evaluate(trainer.engine)
        ranks.check()
        # Inside, where the model computes with the average: that is what was evaluated.
        weights = gather_weights(trainer.engine)
        if best is not None:
            best.offer(outcome, trainer.engine, step=trainer.progress.step)
    ranks.check()
    at("the export", patient=True)
    model = trainer.engine.module
    facts = facts_of(model, features=describe(training) if isinstance(training, FeatureSet) else None)

    def export() -> None:
        write_model(folder / (MODEL_NAME if best is None else LAST_MODEL_NAME), weights, **facts)
        if best is not None:
            best.export(folder / MODEL_NAME)

    made_by_main(export)
    ranks.check()
    # A run that had ended, and is resumed, has it already.
    if is_main() and not trainer.log.has("evaluation", step=trainer.progress.step):
        trainer.log.write("evaluation", outcome.figures, step=trainer.progress.step)
    trainer.log.draw(outcome.pictures)
    summary = _summary(trainer, started)
    written: list[Outcome] = []

    def write() -> None:
        final, note = outcome, None
        if best is not None:
            final = best.outcome()
            summary["chosen"] = best.chosen(last=outcome.merit[1], steps_per_epoch=trainer.steps_per_epoch)
            note = summary["chosen"]["note"]
            trainer.log.say(note)
        # Results first, the summary after them: `summary.json` tells that a run has ended.
        final.write(folder / RESULTS_NAME, note=note)
        write_json(folder / SUMMARY_NAME, final.summary | summary)
        describe_trained(folder, config, model.classes, summary=final.summary | summary, training=training)
        written.append(final)

    made_by_main(write)
    if not is_main():
        return TrainedRun(folder, interrupted=False, summary={})
    return TrainedRun(folder, interrupted=False, summary=written[0].summary | summary, report=written[0].report)


def _summary(trainer: Trainer, started: float) -> dict[str, Any]:
    """What summary.json says of the training."""
    memory = getattr(trainer.engine.module.backbone, "memory", None)
    return {
        **({} if memory is None else {"approximation": approximation(memory.share)}),
        "steps": trainer.progress.step,
        "skipped": trainer.progress.skipped,
        "train_seconds": round(trainer.progress.seconds, 1),
        "total_seconds": round(time.perf_counter() - started, 1),
        "peak_memory_gib": round(peak_memory_gib(trainer.engine.device), 2),
        "ranks": int(trainer.engine.world_size),
    }
