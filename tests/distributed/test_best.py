"""The best model of a run on two ranks, whose weights are in shards."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from distributed.ranks import run_ranks
from training.tiny import TinyDetector, same, tiny_trainer, weights

from re2tal.config import RunConfig
from re2tal.distributed import is_main, made_by_main
from re2tal.runs import best as best_module
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


@pytest.mark.parametrize("failures", [2, 3])
def test_a_disk_that_is_full_for_a_moment_costs_no_best_model(failures, tmp_path, monkeypatch, capsys):
    best, tries = BestModel(tmp_path / "best", RunConfig(), Shards(), Shards()), []  # type: ignore[arg-type]

    def write(path, *_, **__) -> None:
        tries.append(path)
        if sum(isinstance(one, Path) for one in tries) <= failures:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(best_module, "gather_weights", lambda engine: {})
    monkeypatch.setattr(best_module, "write_model", write)
    monkeypatch.setattr(time, "sleep", tries.append)
    one = Outcome(None, {"average_map": 0.5}, {}, lambda path, **_: path.write_text("{}"))  # type: ignore[arg-type]
    engine = SimpleNamespace(module=Named())
    if failures < 3:
        best.offer(one, engine, step=4)
        assert best.read()["step"] == 4
    else:
        with pytest.raises(OSError, match=r"No space left on device: '.*step-00000004.safetensors'\. Earlier .*resume"):
            best.offer(one, engine, step=4)
        assert best.read() is None
    assert [pause for pause in tries if isinstance(pause, float)] == [2.0, 10.0][:failures]
