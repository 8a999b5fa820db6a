"""Where a run is watched: TensorBoard, Weights & Biases, MLflow and others, each through a tracker of accelerate.

No tracker ends a run. The first failure of each is named, all are counted, and one that fails again and again is left
out from there on. Only rank 0 has trackers.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

PROJECT = "re2tal"
"""What trackers that sort runs by project call ours."""
PACKAGES = {
    name: name.replace("_", "-")
    for name in ("tensorboard", "wandb", "mlflow", "comet_ml", "aim", "clearml", "dvclive", "swanlab", "trackio")
}
"""The trackers that accelerate knows, whose names are those of their modules -> what pip installs."""
MOST_FAILURES = 3
"""In a row. A server that does not answer may cost minutes each time."""

Figures = Mapping[str, Any]
"""Name -> a figure of matplotlib."""


def check_trackers(names: Sequence[str]) -> None:
    """ValueError for a tracker that nobody knows, or whose package is not installed."""
    for name in names:
        if name in PACKAGES:
            if find_spec(name) is None:
                raise ValueError(
                    f"training.trackers names {name!r}, whose package is not installed; run `pip install "
                    f"{PACKAGES[name]}`, or leave the tracker out"
                )
        elif name not in _classes():
            raise ValueError(f"training.trackers names {name!r}; known: {', '.join(sorted({*PACKAGES, *_classes()}))}")


class Trackers:
    """The trackers of one run folder, as one. A run that is resumed goes on in the same TensorBoard folder."""

    def __init__(self, names: Sequence[str], folder: Path, *, run_name: str, config: Mapping[str, Any]) -> None:
        """`config`: dotted names and plain values, which trackers show beside the run."""
        self.names = tuple(dict.fromkeys(names))
        self.folder = folder
        self.run_name = run_name
        self.config = {name: _plain(value) for name, value in config.items()}
        self.say: Callable[[str], None] = print
        self._open: dict[str, Any] = {}
        self._failures: dict[str, int] = {}
        self._in_a_row: dict[str, int] = {}
        self._without_pictures: set[str] = set()

    def open(self, *, step: int, say: Callable[[str], None]) -> None:
        """Starts them, or continues at optimizer step `step`; `say` prints what goes wrong."""
        if not self.names:
            return
        from accelerate import PartialState

        PartialState()  # accelerate's trackers ask it which rank they are on
        self.say = say
        for name in self.names:
            self._try(name, "start", partial(self._start, name, step))

    def log(self, values: Mapping[str, float], *, step: int) -> None:
        """Figures by name, at an optimizer step."""
        for name, tracker in [*self._open.items()]:
            self._try(name, "log", partial(tracker.log, dict(values), step=step))

    def draw(self, figures: Callable[[], Figures], *, step: int) -> None:
        """Pictures by name, at an optimizer step; they are drawn only if there is a tracker."""
        if not self._open:
            return
        try:
            drawn = {name: (figure, _pixels(figure)) for name, figure in figures().items()}
        # Whatever drawing raises, here and in `_try` whatever a tracker raises: a run must not end for a picture.
        except Exception as error:
            self.say(f"the pictures of step {step} are left out: {type(error).__name__}: {error}")
            return
        for name, tracker in [*self._open.items()]:
            self._try(name, "draw", partial(self._show, name, tracker, drawn, step))

    def close(self) -> None:
        """Ends them, and says how often each failed; a run that an error ends is no success."""
        failed = sys.exception() is not None
        for name, tracker in [*self._open.items()]:
            self._try(name, "end", partial(_end, name, tracker, failed=failed))
        self._open.clear()
        for name, count in self._failures.items():
            self.say(f"tracker {name} failed {count} times in this run")
        self._failures.clear()

    def _start(self, name: str, step: int) -> None:
        """TensorBoard gets the configuration as a text: its own table of settings would be a second run beside this."""
        settings: dict[str, dict[str, Any]] = {
            # At step 0 too: a run that was killed before its first checkpoint has left figures of later steps.
            "tensorboard": {"purge_step": step + 1 if step else 0},
            "wandb": {"name": self.run_name, "dir": str(self.folder)},
            "mlflow": {"run_name": self.run_name},
            "swanlab": {"experiment_name": self.run_name},
            "dvclive": {"dir": str(self.folder / "dvclive")},
        }
        kind = _classes()[name]
        place = (str(self.folder),) if kind.requires_logging_directory else ()
        tracker = kind(name if name == "tensorboard" else PROJECT, *place, **settings.get(name, {}))
        tracker.start()
        self._open[name] = tracker
        if name != "tensorboard":
            tracker.store_init_configuration(self.config)
        elif not step:
            rows = "\n".join(f"    {key}: {value}" for key, value in self.config.items())
            tracker.log({"config": rows}, step=0)

    def _show(self, name: str, tracker: Any, drawn: Mapping[str, tuple[Any, np.ndarray]], step: int) -> None:
        """Each tracker of accelerate takes pictures in a shape of its own, and some take none."""
        if name == "mlflow":
            for title, (figure, _) in drawn.items():
                tracker.log_figure(figure, f"{title}/{step:07d}.png")
        elif hasattr(tracker, "log_images"):
            alone = name in ("aim", "clearml")
            layout = {"dataformats": "NHWC"} if name == "tensorboard" else {}
            pictures = {title: pixels if alone else pixels[None] for title, (_, pixels) in drawn.items()}
            tracker.log_images(pictures, step=step, **layout)
        elif name not in self._without_pictures:
            self._without_pictures.add(name)
            self.say(f"tracker {name} takes no pictures: timelines and precision-recall curves are not in it")

    def _try(self, name: str, doing: str, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:
            if name not in self._failures:
                reason = f"{type(error).__name__}: {error}"
                self.say(f"tracker {name} failed ({doing}): {reason}; the run goes on, further failures are counted")
            self._failures[name] = self._failures.get(name, 0) + 1
            self._in_a_row[name] = self._in_a_row.get(name, 0) + 1
            if name in self._open and self._in_a_row[name] == MOST_FAILURES:
                self.say(f"tracker {name} failed {MOST_FAILURES} times in a row and is left out from here on")
                del self._open[name]
        else:
            self._in_a_row[name] = 0


def _end(name: str, tracker: Any, *, failed: bool) -> None:
    """accelerate ends every run as a success."""
    if failed and name == "wandb":
        tracker.run.finish(exit_code=1)
    elif failed and name == "mlflow":
        sys.modules["mlflow"].end_run(status="FAILED")  # its tracker has imported it
    else:
        tracker.finish()


def _classes() -> Mapping[str, Any]:
    """Name -> class, with those that users registered at accelerate; imported late, as it takes a second."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    return LOGGER_TYPE_TO_CLASS


def _plain(value: Any) -> bool | int | float | str | None:
    """As trackers take it; of an address neither user and password nor the query, which may hold a signature."""
    if value is None or isinstance(value, bool | int | float):
        return value
    return re.sub(r"(\w+://)(?:[^/@\s]*@)?([^?\s]*)\??[^\s,'\]]*", r"\1\2", str(value))


def _pixels(figure: Any) -> np.ndarray:
    """A figure as (H, W, 3) uint8."""
    figure.canvas.draw()
    return np.ascontiguousarray(np.asarray(figure.canvas.buffer_rgba())[..., :3])
