"""The best model of a run: which it is, what a resumed run makes of it, and what the run says of its choice."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from data.feature_folders import write_features
from training.tiny import TinyDetector, same, tiny_trainer, weights

import re2tal
from re2tal.backbones import BackboneConfig
from re2tal.config import DataConfig, RunConfig
from re2tal.data.streaming.stream import ClipConfig
from re2tal.data.streaming.windows import Slide
from re2tal.evaluation.results import read_results
from re2tal.evaluation.suppression import SuppressionConfig
from re2tal.localizers.pyramid.actionformer import ActionFormerConfig
from re2tal.runs import training_run
from re2tal.runs.best import BestModel
from re2tal.runs.tasks import Outcome
from re2tal.structures import Action
from re2tal.training.config import EngineConfig, TrainingConfig
from re2tal.training.export import read_model
from re2tal.training.schedule import ScheduleConfig


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # so that it is taken away again after the test, whoever sets it
        monkeypatch.delenv(name)


class Named(TinyDetector):
    classes = ("jump",)


class Shards:
    manifest_sha256 = "0" * 64


def best_in(folder: Path, config: RunConfig | None = None) -> BestModel:
    return BestModel(folder / "best", config or RunConfig(), Shards(), Shards())  # type: ignore[arg-type]


def outcome(value: float) -> Outcome:
    return Outcome(None, {"average_map": value}, {}, lambda path, **_: path.write_text(f"{value}"))  # type: ignore[arg-type]


def trained(folder: Path, figures: list[float], best: BestModel, *, epochs: int | None = None) -> list[dict]:
    """The weights at each evaluation of a run that evaluates once an epoch."""
    seen: list[dict] = []

    def validate(engine):
        seen.append(weights(trainer))
        one = outcome(figures[len(seen) - 1])
        best.offer(one, engine, step=trainer.progress.step)
        return one.figures

    training = TrainingConfig(epochs=epochs or len(figures) + 1, evaluate_every_epochs=1, keep_best=True)
    trainer = tiny_trainer(folder, training=training, validate=validate, build=Named)
    if trainer.resume():
        best.start(step=trainer.progress.step, say=print)
    trainer.train()
    return seen


def test_the_best_weights_are_kept_and_the_earlier_of_two_equals(tmp_path: Path) -> None:
    best = best_in(tmp_path)
    seen = trained(tmp_path, [0.2, 0.5, 0.5, 0.3], best)
    best.export(tmp_path / "model.safetensors")
    exported = read_model(tmp_path / "model.safetensors")
    assert same(exported.weights, seen[1])
    assert not same(exported.weights, seen[2])
    assert exported.classes == ("jump",)
    assert sorted(path.name for path in best.folder.iterdir()) == [
        "best.json",
        "step-00000008.json",
        "step-00000008.safetensors",
    ]
    assert best.results.read_text() == "0.5"
    chosen = best.chosen(last=0.25, steps_per_epoch=4)
    assert (chosen["epoch"], chosen["step"]) == (2, 8)
    assert chosen["figures"] == {"4": 0.2, "8": 0.5, "12": 0.5, "16": 0.3}
    assert (
        "the model is that of epoch 2, the best of 4 evaluations by average_map, chosen on the very" in chosen["note"]
    )
    assert "biased upwards; the last weights (last.safetensors) reach 25.00 %" in chosen["note"]
    # Whoever goes on from an evaluation that became the best has its weights.
    assert {"step-00000016", "step-00000020"} <= {path.name for path in (tmp_path / "checkpoints").iterdir()}


def test_a_resumed_run_keeps_the_best_of_before_but_not_of_steps_to_come(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    best = best_in(tmp_path)
    first = trained(tmp_path, [0.2, 0.5], best)
    trained(tmp_path, [0.4, 0.3], best, epochs=5)  # resumed after 3 epochs, whose evaluation is due now
    best.export(tmp_path / "model.safetensors")
    assert same(read_model(tmp_path / "model.safetensors").weights, first[1])
    best.start(step=4, say=print)
    assert "of step 8, is of steps to be trained again; it is forgotten" in capsys.readouterr().out
    assert best.read() is None
    trained(tmp_path, [0.1, 0.05], best, epochs=7)
    other = best_in(tmp_path, RunConfig(suppression=SuppressionConfig(sigma=0.3)))
    other.start(step=100, say=print)
    assert "scored on other videos or by other rules, and is forgotten" in capsys.readouterr().out
    assert other.read() is None


def test_evaluations_begin_with_their_epoch(tmp_path: Path) -> None:
    steps: list[int] = []

    def validate(engine):
        steps.append(trainer.progress.step)
        return {"average_map": 0.5}

    training = TrainingConfig(epochs=8, evaluate_every_epochs=2, evaluate_from_epoch=3)
    trainer = tiny_trainer(tmp_path, training=training, validate=validate)
    trainer.train()
    assert steps == [16, 24]  # of 4 an epoch; the last one is the caller's
    with pytest.raises(ValueError, match=r"evaluate_from_epoch is -1; give 0 or more"):
        TrainingConfig(evaluate_from_epoch=-1)
    with pytest.raises(ValueError, match=r"keep_best is true, but training\.evaluate_every_epochs is null"):
        TrainingConfig(keep_best=True)


def test_a_run_exports_its_best_model_and_says_how_it_was_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    random = np.random.default_rng(0)
    for subset in ("training", "validation"):
        values = {name: torch.from_numpy(random.normal(size=(8, 40)).astype(np.float32)) for name in ("a", "b", "c")}
        write_features(
            tmp_path / "features" / subset,
            values,
            actions=[Action(0.2, 0.8, "jump"), Action(1.0, 1.6, "run")],
            seconds_per_step=1 / 15,
            classes=("jump", "run"),
        )
    blocked = tmp_path / "blocked.json"
    blocked.write_text('["c"]')
    run = RunConfig(
        num_steps=16,
        data=DataConfig(
            shards=tmp_path / "features", clips=ClipConfig(windowing=Slide(16, frames_per_second=None), workers=0)
        ),
        backbone=BackboneConfig(name="features", feature_channels=8, rewired=False),
        localizer=ActionFormerConfig(
            channels=16,
            num_embedding_convs=1,
            num_stem_blocks=1,
            max_num_steps=16,
            regression_ranges=((0, 4), (4, 100)),
        ),
        engine=EngineConfig(batch_size=2),
        schedule=ScheduleConfig(warmup_epochs=1.0),
        training=TrainingConfig(epochs=4, evaluate_every_epochs=1, keep_best=True, average_decay=None),
    )
    run = replace(run, evaluation=replace(run.evaluation, blocked_videos=blocked))
    # The second of four evaluations does best.
    judge, made = training_run.judge, []

    def judged(*arguments, **keywords):
        made.append(judge(*arguments, **keywords))
        figures = {"average_map": (0.1, 0.9, 0.2, 0.3)[len(made) - 1]}
        return made[-1]._replace(figures=figures)

    monkeypatch.setattr(training_run, "judge", judged)
    done = re2tal.train(run, out=tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["chosen"]["epoch"] == 2
    assert summary["average_map"] == done.report.average_map == made[1].report.average_map
    assert "2 videos; 1 of the 1 videos on the blocked list left out" in summary["scored"]
    best, last = (read_model(tmp_path / "run" / name) for name in ("model.safetensors", "last.safetensors"))
    assert not same(best.weights, last.weights)
    results = read_results(tmp_path / "run" / "results.json")
    assert results.note == summary["chosen"]["note"]
    assert "reach 30.00 %" in results.note
    assert results.note in capfd.readouterr().err
    assert "the best of 4 evaluations" in (tmp_path / "run" / "README.md").read_text()
