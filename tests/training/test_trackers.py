"""Trackers: what reaches them, what becomes of one that fails, and real TensorBoard files."""

from __future__ import annotations

import sys
from contextlib import closing, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
from accelerate import tracking
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from re2tal.training.metrics import MetricsLog
from re2tal.training.trackers import MOST_FAILURES, Trackers, check_trackers

CONFIG = {
    "name": "mine",
    "training.epochs": 3,
    "data.shards": "https://me:secret@host/x?sig=secret",
    "start_from": None,
}


class Fake(tracking.GeneralTracker):
    """Notes what it is told, and fails where it should."""

    name = "fake"
    requires_logging_directory = False
    told: ClassVar[list[tuple]] = []
    fails: ClassVar[set[str]] = set()

    def __init__(self, run_name: str) -> None:
        super().__init__()
        self.run_name = run_name

    @property
    def tracker(self) -> None:
        return None

    def _note(self, what: str, *values: object) -> None:
        if what in self.fails:
            raise ConnectionError("no route to host")
        self.told.append((what, *values))

    def start(self) -> None:
        self._note("start", self.run_name)

    def store_init_configuration(self, values: dict) -> None:
        self._note("config", values)

    def log(self, values: dict, step: int | None = None, **kwargs: object) -> None:
        self._note("log", values, step)

    def log_images(self, values: dict, step: int | None = None) -> None:
        self._note("images", {name: pictures.shape for name, pictures in values.items()}, step)

    def finish(self) -> None:
        self._note("finish")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[Fake]:
    monkeypatch.setattr(tracking, "LOGGER_TYPE_TO_CLASS", {**tracking.LOGGER_TYPE_TO_CLASS, "fake": Fake})
    monkeypatch.setattr(Fake, "told", [])
    monkeypatch.setattr(Fake, "fails", set())
    return Fake


def picture() -> Figure:
    figure = Figure(figsize=(2, 1), dpi=50)
    FigureCanvasAgg(figure)
    figure.subplots().plot([0, 1])
    return figure


def logged(folder: Path, names: tuple[str, ...], *, start: int, until: int) -> None:
    trackers = Trackers(names, folder, run_name="mine", config=CONFIG)
    log = MetricsLog(folder, enabled=True, trackers=trackers)
    log.open(step=start, num_steps=9)
    for step in range(start + 1, until + 1):
        log.advance()
        log.write("train", {"loss": 1 / step, "loss/boundary": 0.5, "lr/backbone": 1e-4}, step=step)
    log.write("evaluation", {"average_map": 0.25, "map/0.5": 0.5}, step=until)
    log.draw(lambda: {"precision_recall": picture(), "timeline/1": picture()})
    log.close()


def test_a_tracker_gets_figures_pictures_and_the_configuration_without_secrets(tmp_path, fake) -> None:
    logged(tmp_path, ("fake",), start=0, until=1)
    assert fake.told == [
        ("start", "re2tal"),
        ("config", {"name": "mine", "training.epochs": 3, "data.shards": "https://host/x", "start_from": None}),
        ("log", {"train/loss": 1.0, "train/loss/boundary": 0.5, "train/lr/backbone": 1e-4}, 1),
        ("log", {"evaluation/average_map": 0.25, "evaluation/map/0.5": 0.5}, 1),
        ("images", {"precision_recall": (1, 50, 100, 3), "timeline/1": (1, 50, 100, 3)}, 1),
        ("finish",),
    ]


def test_tensorboard_holds_scalars_and_pictures_and_a_resumed_run_goes_on_in_its_folder(tmp_path) -> None:
    logged(tmp_path, ("tensorboard",), start=0, until=4)
    logged(tmp_path, ("tensorboard",), start=2, until=3)
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0, "images": 0}).Reload()
    losses = {one.step: one.value for one in events.Scalars("train/loss")}
    assert losses == pytest.approx({1: 1, 2: 1 / 2, 3: 1 / 3})  # step 4 was forgotten
    assert events.Scalars("evaluation/map/0.5")[-1].value == 0.5
    assert {"precision_recall", "timeline/1"} <= set(events.Tags()["images"])
    assert (events.Images("precision_recall")[-1].width, events.Images("precision_recall")[-1].height) == (100, 50)
    text = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "training.epochs: 3" in text
    assert "secret" not in text
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["tensorboard"]


def test_figures_of_a_run_that_died_before_its_first_checkpoint_are_gone_from_tensorboard(tmp_path) -> None:
    logged(tmp_path, ("tensorboard",), start=0, until=4)
    logged(tmp_path, ("tensorboard",), start=0, until=2)
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    assert [one.step for one in events.Scalars("train/loss")] == [1, 2]
    assert "config/text_summary" in events.Tags()["tensors"]


@pytest.mark.parametrize("failing", ["start", "config"])
def test_a_tracker_that_does_not_start_is_named_once_and_the_others_go_on(failing, tmp_path, fake, capsys) -> None:
    fake.fails.add(failing)
    logged(tmp_path, ("fake", "tensorboard"), start=0, until=3)
    printed = capsys.readouterr().err
    assert printed.count("tracker fake failed (start): ConnectionError: no route to host; the run goes on") == 1
    assert "tracker fake failed 1 times in this run" in printed
    assert bool([one for one in fake.told if one[0] == "log"]) == (failing == "config")  # it needs no configuration
    assert list((tmp_path / "tensorboard").iterdir())


def test_one_that_fails_again_and_again_is_counted_and_left_out(tmp_path, fake, capsys) -> None:
    fake.fails.add("log")
    logged(tmp_path, ("fake",), start=0, until=6)
    printed = capsys.readouterr().err
    assert f"tracker fake failed {MOST_FAILURES} times in a row and is left out from here on" in printed
    assert f"tracker fake failed {MOST_FAILURES} times in this run" in printed
    assert printed.count("ConnectionError") == 1


@pytest.mark.parametrize("fails", [True, False])
def test_a_run_that_fails_is_no_success(fails: bool, tmp_path, fake, monkeypatch) -> None:
    ended = []
    run = SimpleNamespace(finish=lambda exit_code=0: ended.append(("wandb", exit_code)))
    module = SimpleNamespace(end_run=lambda status="FINISHED": ended.append(("mlflow", status)))
    monkeypatch.setitem(sys.modules, "mlflow", module)
    kinds = {
        "wandb": type("W", (Fake,), {"run": run, "finish": lambda self: self.run.finish()}),
        "mlflow": type("M", (Fake,), {"finish": lambda self: module.end_run()}),
    }
    for kind in kinds.values():
        kind.__init__ = lambda self, project, **settings: Fake.__init__(self, project)
    monkeypatch.setattr(tracking, "LOGGER_TYPE_TO_CLASS", {**tracking.LOGGER_TYPE_TO_CLASS, **kinds})
    trackers = Trackers(("wandb", "mlflow"), tmp_path, run_name="mine", config=CONFIG)
    with suppress(RuntimeError), closing(trackers):
        trackers.open(step=0, say=pytest.fail)
        if fails:
            raise RuntimeError("out of memory")
    assert ended == ([("wandb", 1), ("mlflow", "FAILED")] if fails else [("wandb", 0), ("mlflow", "FINISHED")])


def test_a_drawing_that_fails_ends_nothing(tmp_path, fake, capsys) -> None:
    trackers = Trackers(("fake",), tmp_path, run_name="mine", config={})
    trackers.open(step=0, say=print)
    trackers.draw(lambda: {"broken": 1 / 0}, step=3)
    trackers.close()
    assert "the pictures of step 3 are left out: ZeroDivisionError" in capsys.readouterr().out


def test_an_unknown_tracker_and_a_missing_package_are_refused_with_a_remedy(fake) -> None:
    check_trackers(("tensorboard", "fake"))
    with pytest.raises(ValueError, match=r"training.trackers names 'wandbb'; known: aim, .*fake.*wandb"):
        check_trackers(("wandbb",))
    with pytest.raises(ValueError, match="'comet_ml', whose package is not installed; run `pip install comet-ml`"):
        check_trackers(("comet_ml",))
