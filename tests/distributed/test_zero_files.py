"""Every file in ds_configs/ trains alike on two ranks, and evaluates with the weights it exports."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from distributed.ranks import run_ranks
from training.tiny import TinyDetector, tiny_trainer, weights

from re2tal.training.process_group import leave

FOLDER = Path(__file__).parents[2] / "ds_configs"
NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))


def train_with_every_file(folder: str, precision: str) -> dict:
    """Weights and averaged weights by file, and how far the engine is from a plain model that has them."""
    found = {}
    for name in NAMES:
        zero = json.loads((FOLDER / f"{name}.json").read_text())["zero_optimization"]
        trainer = tiny_trainer(Path(folder) / name, zero=zero, precision=precision)
        trainer.train()
        own = weights(trainer)
        with trainer.averaged_weights():
            average = weights(trainer)
            difference = distance_to_a_plain_model(trainer, average)
        found[name] = {
            "weights": own,
            "average": average,
            "differences": [difference, distance_to_a_plain_model(trainer, own)],
        }
    leave()
    return found


def distance_to_a_plain_model(trainer, exported: dict[str, torch.Tensor]) -> float:
    """Every rank calls this: forward is a collective under ZeRO-3."""
    batch = trainer.clips.batch(7, 0)
    trainer.engine.eval()
    with torch.no_grad():
        frames = trainer.prepare(batch, 0)
        outputs = trainer.engine(frames, batch.frame_mask).values
    trainer.engine.train()
    if not exported:
        return 0.0
    plain = TinyDetector().eval()
    plain.load_state_dict(exported)
    with torch.no_grad():
        return float((plain.to(frames.dtype)(frames, batch.frame_mask).values - outputs).abs().max())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_file_trains_to_the_same_weights_and_computes_with_them(precision, tmp_path):
    found, _ = run_ranks(
        train_with_every_file, world_size=2, timeout_seconds=280, folder=str(tmp_path), precision=precision
    )
    for name in NAMES:
        assert found[name]["differences"] == [0.0, 0.0], name
        for kind in ("weights", "average"):
            for key, value in found[name][kind].items():
                expected = found["zero2"][kind][key]
                tolerance = 1e-6 if precision == "fp32" else 2e-3
                torch.testing.assert_close(
                    value, expected, rtol=0, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
                )
        # Eight steps of an average that keeps 99.9 %: it has not followed.
        assert not torch.equal(found[name]["weights"]["localizer.bias"], found[name]["average"]["localizer.bias"])
