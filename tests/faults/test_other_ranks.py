"""A run that goes on with other ranks and another ZeRO stage is the same run."""

from __future__ import annotations

import json
import os
import random
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from data.feature_folders import write_features
from deepspeed.utils import safe_get_full_optimizer_state
from distributed.ranks import run_ranks
from faults.test_told_to_stop import small_run
from safetensors.torch import load_file
from training.tiny import TinyDetector, same, tiny_trainer, weights

from re2tal.cli.train import train
from re2tal.localizers.losses import RunningCount
from re2tal.runs import training_run
from re2tal.structures import Action
from re2tal.training.config import EngineConfig, TrainingConfig
from re2tal.training.elastic import place_in_run, same_clips_per_step
from re2tal.training.generators import seed_draws
from re2tal.training.manifest import TrainingProgress, read_manifest, write_manifest
from re2tal.training.process_group import leave
from re2tal.training.reshard import resharded
from re2tal.training.trainer import Trainer


def part_of_a_run(features: str, folder: str, ds: str, stop_before: int | None, whole: bool) -> int:
    """A run that drops paths, and is told to stop in a step; its exit status."""
    run = small_run(features)
    run = replace(run, localizer=replace(run.localizer, path_drop=0.3))
    losses = Trainer._forward

    def signalled(self: Trainer, batch):
        if self.progress.step + 1 == stop_before and os.environ["RANK"] == "0":
            os.kill(os.getpid(), signal.SIGTERM)
        return losses(self, batch)

    training_run.leave = lambda: None  # the ranks stay together for the second run
    if whole:
        train(run=run, ds=ds, out=Path(folder) / "whole")
    Trainer._forward = signalled
    status = train(run=run, ds=ds, out=Path(folder) / "parts", resume=True)
    leave()
    return status


@pytest.mark.parametrize(
    "stages",
    [
        ("zero3", "zero0", "zero2_offload"),
        pytest.param(("zero2", "zero3", "zero2"), marks=pytest.mark.slow),
        pytest.param(("zero0", "zero3_offload", "zero0"), marks=pytest.mark.slow),
    ],
)
def test_from_two_ranks_to_one_and_back_ends_with_the_same_loss(stages, tmp_path):
    (tmp_path / "zero0.json").write_text('{"zero_optimization": {"stage": 0}}')
    stages = [str(tmp_path / "zero0.json") if stage == "zero0" else stage for stage in stages]
    features = tmp_path / "features"
    for number, subset in enumerate(("training", "validation")):
        generator = torch.Generator().manual_seed(number)
        values = {f"{subset}{n}": torch.randn(12, 20 + n, generator=generator) for n in range(9)}
        actions = [Action(0.5 * n, 0.5 * n + 1.5, "jump") for n in range(4)]
        write_features(features / subset, values, actions=actions, classes=("jump",))
    course = {"features": str(features), "folder": str(tmp_path)}
    parts = [(2, stages[0], 2), (1, stages[1], 5), (2, stages[2], None)]
    ended = []
    for place, (ranks, ds, stop_before) in enumerate(parts):
        named = {**course, "ds": ds, "stop_before": stop_before, "whole": place == 0}
        ended.append(run_ranks(part_of_a_run, world_size=ranks, timeout_seconds=280, **named))
    assert ended == [[75, 75], [75], [0, 0]]
    logs = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "parts")]
    whole, parts = ([row for row in map(json.loads, log) if row["kind"] == "train"] for log in logs)
    assert [row["step"] for row in whole] == [row["step"] for row in parts] == list(range(1, 9))
    assert [row["lr"] for row in whole] == [row["lr"] for row in parts]
    for ours, theirs in zip(parts, whole, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
    expected, weights = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    for name in expected:
        torch.testing.assert_close(weights[name], expected[name], rtol=1e-4, atol=1e-5)


def test_no_two_batches_of_a_run_share_draws_and_each_draws_the_same_again():
    def drawn(batch: int) -> tuple[float, ...]:
        seed_draws(3, batch)
        return float(torch.rand(())), random.random(), float(np.random.rand())

    draws = [drawn(batch) for batch in range(200)]
    assert [len(set(of_one)) for of_one in zip(*draws, strict=True)] == [200] * 3
    assert draws == [drawn(batch) for batch in range(200)]


def test_a_checkpoint_whose_epochs_had_other_lengths_is_refused(tmp_path, monkeypatch):
    """As of versions in which a step of two batches could take them from two epochs."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for number, subset in enumerate(("training", "validation")):
        generator = torch.Generator().manual_seed(number)
        values = {f"{subset}{n}": torch.randn(12, 20, generator=generator) for n in range(3)}
        write_features(tmp_path / subset, values, actions=[Action(0.5, 2.0, "jump")], classes=("jump",))
    run = small_run(str(tmp_path))
    run = replace(run, engine=replace(run.engine, gradient_accumulation=2))
    training_run.train(run, ds="zero2", out=tmp_path / "run")
    [newest, *_] = sorted((tmp_path / "run" / "checkpoints").glob("step-*"), reverse=True)
    manifest = read_manifest(newest)
    files = json.loads((newest / "manifest.json").read_text())["files"]
    before = {name: value for name, value in manifest.run.items() if name != "optimizer steps of an epoch"}
    write_manifest(newest, run=before, progress=manifest.progress, files=files)
    with pytest.raises(ValueError, match=r"optimizer steps of an epoch is 1\.0, the checkpoint has 1\.5\."):
        training_run.train(run, ds="zero2", out=tmp_path / "run", resume=True)


def test_accumulation_adapts_and_sizes_that_do_not_fit_are_refused():
    saved = {"engine.batch_size": 2, "engine.gradient_accumulation": 3, "number of ranks": 4}
    config = EngineConfig(batch_size=2, gradient_accumulation=3)
    for ranks, accumulation in ((1, 12), (2, 6), (3, 4), (4, 3), (6, 2), (12, 1)):
        assert same_clips_per_step(config, saved, num_ranks=ranks).gradient_accumulation == accumulation
    with pytest.raises(ValueError, match=r"takes 12 batches of 2 clips, which 5 .* resume on 1, 2, 3, 4, 6, 12 ranks"):
        same_clips_per_step(config, saved, num_ranks=5)
    # Who gives an accumulation that fits has adapted it already.
    # Saved on 2 ranks meanwhile, and started once more with the options of the first start.
    since = {**saved, "engine.gradient_accumulation": 6, "number of ranks": 2}
    for ranks, accumulation in ((2, 6), (1, 12), (4, 3)):
        assert same_clips_per_step(config, since, num_ranks=ranks).gradient_accumulation == accumulation
    given = EngineConfig(batch_size=2, gradient_accumulation=6)
    assert same_clips_per_step(given, saved, num_ranks=2) == given
    assert place_in_run(TrainingProgress(step=2, micro_batches=6), saved, num_ranks=3) == TrainingProgress(
        step=2, micro_batches=8
    )


def test_losses_of_a_step_do_not_depend_on_how_its_batches_are_split():
    batches = [torch.tensor(count) for count in (3, 50, 11, 200)]

    def divisors(ranks: int) -> tuple[list[float], int]:
        counts = [RunningCount(100, momentum=0.9) for _ in range(ranks)]
        found = {}
        for step in range(2):
            for count in counts:
                count.begin_step()
            for first in range(0, 4, ranks):
                of_ranks = torch.stack([batches[first + rank] + step for rank in range(ranks)]).double()
                for rank, count in enumerate(counts):
                    count.of_all_ranks = lambda own, rank=rank, all_of=of_ranks: (all_of, rank)
                    found[step, first + rank] = float(count.update(of_ranks[rank]))
        assert len({int(count.units) for count in counts}) == 1
        return [found[key] for key in sorted(found)], int(counts[0].units)

    assert divisors(1) == divisors(2) == divisors(4)
    # Worked by hand: 0.9 * 100 + 0.1 * 3, then 0.9 * 100 + 0.1 * (3 + 50) / 2.
    assert divisors(1)[0][:2] == pytest.approx([90.3, 92.65], abs=1e-4)


def trained(folder: str, stage: int, precision: str) -> dict[str, torch.Tensor]:
    """Weights, their average and both moments by parameter, of a run that ends with a checkpoint."""
    trainer = tiny_trainer(folder, stage=stage, precision=precision)
    trainer.train()
    states = states_of(trainer)
    leave()
    return states


def taken_over(folder: str, stage: int, precision: str) -> dict[str, torch.Tensor]:
    """The same of a run of another shape, which took over that checkpoint and has trained no step."""
    trainer = tiny_trainer(folder, stage=stage, precision=precision)
    newest = sorted((Path(folder) / "checkpoints").glob("step-*"))[-1]
    load = trainer.engine.checkpoint_engine.load
    resharded(newest, trainer.engine, trainer.average, read=lambda path: load(str(path), map_location="cpu"))
    states = states_of(trainer)
    counters = [trainer.engine.global_steps, trainer.engine.lr_scheduler.last_epoch]
    leave()
    return {**states, "counters": torch.tensor(counters)}


def states_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Every rank calls this."""
    states = {f"weights of {name}": value for name, value in weights(trainer).items() if name != "seen"}
    with trainer.averaged_weights():
        states |= {f"average of {name}": value for name, value in weights(trainer).items() if name != "seen"}
    optimizer = trainer.engine.optimizer
    if hasattr(optimizer, "_hp_optimizer_states_linked"):  # stages 1 and 2, which look the moments up once, too early
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()
    for name, parameter in trainer.engine.module.named_parameters():
        for key in ("exp_avg", "exp_avg_sq"):
            whole = trainer.engine.zero_optimization_stage() == 0  # then torch's own optimizer holds it
            value = optimizer.state[parameter][key] if whole else safe_get_full_optimizer_state(parameter, key)
            assert value is not None
            states[f"{key} of {name}"] = value.clone()
    return states


class Frozen(TinyDetector):
    """Its first layer is not trained; `start` is what a weights file says of it."""

    start = 0.5

    def __init__(self) -> None:
        super().__init__()
        self.backbone[0].requires_grad_(False)
        self.backbone[0].weight.data.fill_(self.start)


def test_frozen_weights_are_those_of_the_checkpoint(tmp_path, monkeypatch):
    for number, (before, after) in enumerate(((2, 3), (3, 2))):
        folder = tmp_path / str(number)
        monkeypatch.setattr(Frozen, "start", 0.5)
        trained_one = tiny_trainer(folder, stage=before, build=Frozen, training=TrainingConfig(epochs=1))
        trained_one.train()
        monkeypatch.setattr(Frozen, "start", 7.0)  # the file that the backbone starts from was replaced
        again = tiny_trainer(folder, stage=after, build=Frozen)
        [newest] = (folder / "checkpoints").glob("step-*")
        load = again.engine.checkpoint_engine.load
        resharded(newest, again.engine, again.average, read=lambda path, load=load: load(str(path), map_location="cpu"))
        assert same(weights(again), weights(trained_one))
    leave()


SHAPES = [
    # precision, ranks and stage before, ranks and stage after
    ("fp32", (2, 0), (3, 2)),
    ("fp32", (2, 0), (1, 3)),
    ("fp32", (3, 3), (2, 0)),
    ("fp32", (1, 1), (2, 0)),
    ("fp32", (2, 0), (1, 0)),
    ("fp32", (4, 3), (3, 3)),
    ("bf16", (3, 2), (2, 3)),
    ("fp32", (4, 3), (3, 2)),
    ("fp32", (1, 2), (2, 1)),
    ("bf16", (2, 1), (1, 3)),
    ("fp32", (2, 1), (1, 1)),
    ("fp32", (2, 2), (1, 2)),
    ("fp32", (2, 3), (1, 3)),
    ("fp32", (1, 1), (2, 1)),
    ("bf16", (1, 3), (2, 2)),
    ("bf16", (2, 2), (4, 2)),
    ("fp32", (2, 3), (4, 3)),
    ("fp32", (4, 1), (2, 2)),
]


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "before", "after"), SHAPES)
def test_every_number_of_a_checkpoint_arrives_on_other_ranks(precision, before, after, tmp_path):
    (ranks, stage), (new_ranks, new_stage) = before, after
    given = {"folder": str(tmp_path), "precision": precision, "timeout_seconds": 280}
    [saved, *_] = run_ranks(trained, world_size=ranks, stage=stage, **given)
    [found, *_] = run_ranks(taken_over, world_size=new_ranks, stage=new_stage, **given)
    assert found.pop("counters").tolist() == [8, 8]
    assert found.keys() == saved.keys()
    for name, value in saved.items():
        assert torch.equal(found[name], value), name
