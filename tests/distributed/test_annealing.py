"""A rewired network trained from its plain function to the paper's coupling, on two ranks, with an interruption."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import torch
from distributed.ranks import run_ranks
from training.tiny import RewiredTinyDetector, same, tiny_trainer, weights

from re2tal.distributed import is_main
from re2tal.rewire import beta_of
from re2tal.training.annealing import AnnealingConfig, beta_course
from re2tal.training.config import TrainingConfig
from re2tal.training.process_group import leave


def interrupted_on_the_way(folder: str, stage: int) -> dict:
    """A whole run beside one that stopped after step 3 of an annealing of 6 and went on as a new one."""
    evaluated: list[float] = []

    def validate(engine) -> dict[str, float]:
        evaluated.append(beta_of(engine.module))
        return {"average_map": 0.5}

    build = partial(
        tiny_trainer,
        stage=stage,
        training=TrainingConfig(
            epochs=2, checkpoint_every_steps=3, keep_checkpoints=3, log_every_steps=1, evaluate_every_epochs=1
        ),
        build=RewiredTinyDetector,
        beta=beta_course(AnnealingConfig(epochs=1.5), end=1.0, steps_per_epoch=4, num_steps=8),
        validate=validate,
    )
    place = Path(folder)
    whole = build(place / "whole")
    whole.train()
    expected, ends = weights(whole), [beta_of(whole.engine.module)]
    build(place / "halved").train()
    if is_main():
        for name in ("step-00000006", "step-00000008"):
            shutil.rmtree(place / "halved" / "checkpoints" / name)
    torch.distributed.barrier()
    after = build(place / "halved")
    after.resume()
    resumed_at = beta_of(after.engine.module)
    after.train()
    found = weights(after)
    fresh = build(place / "halved")  # resumes where nothing is left to train, to be evaluated and exported
    fresh.resume()
    ends += [beta_of(after.engine.module), beta_of(fresh.engine.module)]
    leave()
    return {"alike": same(found, expected), "resumed at": resumed_at, "ends": ends, "evaluated": evaluated}


def test_a_run_resumed_on_the_way_ends_bit_for_bit_like_an_uninterrupted_one(tmp_path):
    for of_rank in run_ranks(interrupted_on_the_way, world_size=2, timeout_seconds=200, folder=str(tmp_path), stage=2):
        assert of_rank == {
            "alike": True,
            "resumed at": 0.5,
            "ends": [1.0, 1.0, 1.0],
            "evaluated": [4 / 6, 4 / 6, 4 / 6],  # after step 4, in each of the three
        }
    for run in ("whole", "halved"):
        rows = [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        steps = [row for row in rows if row["kind"] == "train"]
        assert [round(row["beta"] * 6) for row in steps] == [1, 2, 3, 4, 5, 6, 6, 6]
        # Of the six that backward needs. An error may grow by 8, and does by 1 / beta a step: in 1, 1, 3 and 5 of them.
        assert [row["kept_states"] for row in steps] == [5, 5, 4, 2, 2, 2, 2, 2]
        # The first state is rebuilt from step 4 on, and watched in every second one since the run was started.
        assert all(0 <= row["drift"] < 1e-5 and row["outside_grid"] == 0 for row in steps[4:])
        assert steps[-1]["drift"] > 0
        assert "drift" not in steps[0]
