"""The best model of a run on two ranks, whose weights are in shards."""

from __future__ import annotations

from pathlib import Path

import pytest
from distributed.ranks import run_ranks
from training.tiny import TinyDetector, same, tiny_trainer, weights

from re2tal.config import RunConfig
from re2tal.distributed import is_main, made_by_main
from re2tal.runs.best import BestModel
from re2tal.runs.tasks import Outcome
from re2tal.training.config import TrainingConfig
from re2tal.training.export import read_model

FIGURES = (0.2, 0.5, 0.3)


class Named(TinyDetector):
    classes = ("jump",)


class Shards:
    manifest_sha256 = "0" * 64


def keep_the_second(folder: str) -> dict:
    """Whether what is exported are the weights that the second of three evaluations saw, under ZeRO-3."""
    best, seen = BestModel(Path(folder) / "best", RunConfig(), Shards(), Shards()), []  # type: ignore[arg-type]

    def validate(engine):
        seen.append(weights(trainer))
        figures = {"average_map": FIGURES[len(seen) - 1]}
        one = Outcome(None, figures, {}, lambda path, **_: path.write_text("{}"))  # type: ignore[arg-type]
        best.offer(one, engine, step=trainer.progress.step)
        return figures

    training = TrainingConfig(epochs=4, evaluate_every_epochs=1, keep_best=True)
    trainer = tiny_trainer(folder, stage=3, training=training, validate=validate, build=Named)
    trainer.train()
    best.start(step=trainer.progress.step, say=print)
    model = Path(folder) / "model.safetensors"
    made_by_main(lambda: best.export(model))
    exported = read_model(model).weights
    return {"alike": [same(exported, one) for one in seen] if is_main() else []}


@pytest.mark.slow
def test_the_exported_model_is_that_of_the_best_evaluation_whatever_is_sharded(tmp_path: Path) -> None:
    first, second = run_ranks(keep_the_second, world_size=2, timeout_seconds=280, folder=str(tmp_path))
    assert first["alike"] == [False, True, False]
    assert second["alike"] == []
