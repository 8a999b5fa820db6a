"""A run that goes on with what is offloaded on the device, or the other way round, is the same run."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from distributed.ranks import run_ranks
from training.tiny import tiny_trainer, weights

from re2tal.distributed import is_main
from re2tal.training.config import TrainingConfig
from re2tal.training.process_group import leave

OPTIMIZER, PARAMETERS = ({name: {"device": "cpu"}} for name in ("offload_optimizer", "offload_param"))
CASES: dict[str, tuple[dict, dict]] = {
    "2 to 2 offloaded": ({"stage": 2}, {"stage": 2, **OPTIMIZER}),
    "3 offloaded to 3": ({"stage": 3, **OPTIMIZER, **PARAMETERS}, {"stage": 3}),
    "1 offloaded to 1": ({"stage": 1, **OPTIMIZER}, {"stage": 1}),
    "3 to 3 offloaded": ({"stage": 3}, {"stage": 3, **OPTIMIZER, **PARAMETERS}),
}
EVERY_THIRD = TrainingConfig(epochs=2, checkpoint_every_steps=3, keep_checkpoints=3, log_every_steps=1)


def goes_on_elsewhere(folder: str) -> dict[str, dict]:
    """Weights of a whole run, and of one that goes on after step 3 in the other way, by case."""
    found = {}
    for name, (before, after) in CASES.items():
        stage, place = before["stage"], Path(folder) / name
        whole = tiny_trainer(place, stage=stage, zero=before, training=EVERY_THIRD)
        whole.train()
        expected = weights(whole)
        if is_main():
            for step in (6, 8):
                shutil.rmtree(place / "checkpoints" / f"step-{step:08d}")
        torch.distributed.barrier()
        again = tiny_trainer(place, stage=stage, zero=after, training=EVERY_THIRD)
        again.resume()
        start = again.progress.step
        again.train()
        found[name] = {"start": start, "expected": expected, "found": weights(again)}
    leave()
    return found


def test_a_run_ends_alike_whether_it_is_offloaded_or_not(tmp_path):
    [of_main, _] = run_ranks(goes_on_elsewhere, world_size=2, timeout_seconds=250, folder=str(tmp_path))
    for name, case in of_main.items():
        assert case["start"] == 3, name
        for weight, value in case["expected"].items():
            torch.testing.assert_close(case["found"][weight], value, rtol=1e-5, atol=1e-6, msg=f"{name}: {weight}")
