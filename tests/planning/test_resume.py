"""A resumed run goes on with the plan of its folder, to the last bit, and plans anew for another budget."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from re2tal.cli import main
from re2tal.data.building.demo import DemoConfig, write_demo
from re2tal.planning import choice
from re2tal.planning.settings import Setting
from re2tal.planning.step_plan import StepPlan
from re2tal.strict_json import read_json
from re2tal.training.export import read_model

SMALL = {
    "backbone.name": "videomae_nano",
    "data.clips.windowing.num-frames": 16,
    "data.clips.size": 32,
    "data.clips.workers": 1,
    "num-steps": 8,
    "localizer.channels": 16,
    "localizer.max-num-steps": 8,
    "engine.batch-size": 1,
    "engine.memory-budget-gb": 10,
    "schedule.warmup-epochs": 0.5,
    "training.epochs": 2,
    "training.checkpoint-every-steps": 2,
    "training.log-every-steps": 1,
}


@pytest.fixture
def shards(tmp_path) -> Path:
    """Two training videos and a validation video of the demo."""
    write_demo(tmp_path, DemoConfig(num_training=2, num_validation=1), workers=1)
    arguments = ["--dataset", "demo", "--videos", tmp_path / "videos", "--annotations", tmp_path / "annotations.json"]
    with pytest.raises(SystemExit):
        main(["shards", "build", *map(str, arguments), "--out", str(tmp_path / "shards"), "--workers", "1"])
    return tmp_path / "shards"


@pytest.fixture
def train(shards, tmp_path, monkeypatch, capfd):
    """Trains into `tmp_path / "run"`; gives what is said. Stages `fastest`, "stored" or "pieces", are timed so."""

    def train(*, fastest: str, **changes) -> str:
        def seconds(run, settings: list[Setting], *, order: list[str], **_) -> list[list[float]]:
            return [[1.0 if fastest in str(one) else 2.0] * len(order) for one in settings]

        monkeypatch.setattr(choice, "measured_seconds", seconds)
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            monkeypatch.setenv(name, "")  # so that what a run sets is gone after the test
            monkeypatch.delenv(name)
        options = {**SMALL, "data.shards": shards, "out": tmp_path / "run", **changes}
        with pytest.raises(SystemExit) as end:
            main(["train", *flat(options)])
        assert end.value.code == 0
        return capfd.readouterr().err

    return train


def test_a_resumed_run_has_the_same_weights_with_the_plan_that_another_timing_would_not_choose(train, tmp_path):
    out = tmp_path / "run"
    said = train(fastest="pieces")
    assert "planned for 10.000 GB" in said
    assert "GB planned," in said, "the measured peak beside the planned one"
    whole, plan = read_model(out / "model.safetensors").weights, (out / "plan.json").read_text()
    assert all("pieces" in str(setting) for setting in settings_in(out))

    forget_the_last_steps(out)
    said = train(fastest="stored", resume=None)
    assert f"the stages of the backbone run as in {out / 'plan.json'}" in said
    assert "resumed at step 2 of 4" in said
    assert (out / "plan.json").read_text() == plan
    resumed = read_model(out / "model.safetensors").weights
    assert all(value.equal(resumed[name]) for name, value in whole.items())


@pytest.mark.slow
def test_a_resumed_run_plans_anew_for_another_budget(train, tmp_path):
    out = tmp_path / "run"
    train(fastest="pieces")
    whole = read_model(out / "model.safetensors").weights
    forget_the_last_steps(out)
    said = train(fastest="stored", resume=None, **{"engine.memory-budget-gb": 9})
    assert f"planning anew: engine.memory_budget_gb is 9.0, in {out / 'plan.json'} it is 10.0" in said
    assert all(str(setting) == "stored" for setting in settings_in(out))
    other = read_model(out / "model.safetensors").weights
    assert all(value.allclose(other[name], atol=1e-2) for name, value in whole.items())
    assert not all(value.equal(other[name]) for name, value in whole.items()), "or equal weights show nothing"


def flat(options: dict) -> list[str]:
    """As on the command line; None is a flag."""
    given = [(f"--{name}", () if value is None else (str(value),)) for name, value in options.items()]
    return [part for name, values in given for part in (name, *values)]


def forget_the_last_steps(out: Path) -> None:
    """As if the run had been killed after step 2."""
    shutil.rmtree(out / "checkpoints" / "step-00000004")


def settings_in(out: Path) -> list[Setting]:
    document = read_json(out / "plan.json")
    del document["format"]
    return list(StepPlan.from_json(document).settings.values())
