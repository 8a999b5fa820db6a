"""The loss, the validation mAP, the learning rates, speed and memory of a run, from its metrics.jsonl.

One line of the log is {"step": 40, "kind": "train", "loss": 0.82, "loss/...": ..., "lr/...": ...} or
{"step": 40, "kind": "evaluation", "average_map": 0.41, ...}.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
STYLES = ("-", "--", "-.", ":")


def read_metrics(path: Path | str) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, in the file's order; half a line at the end, of a run that still writes, is left.

    Raises FileNotFoundError, and ValueError naming file and line for anything else that is not a row with a step.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file; train first, or name a run folder that holds a metrics.jsonl")
    rows = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(keepends=True), start=1):
        if not line.endswith("\n"):
            break
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}, is not JSON ({error}); delete that line") from error
        if not isinstance(row, dict) or type(row.get("step")) is not int:
            raise ValueError(f'{path}, line {number}, has no whole number "step"; delete that line')
        rows.append(row)
    return rows


RESOURCES = {
    "clips_per_second": "clips per second",
    "loader_wait": "share of time\nwaiting for clips",
    "peak_memory_gib": "peak memory, GiB",
}
"""Keys of training rows that get a panel of their own, and its label."""


def draw_curves(rows: Sequence[Mapping[str, Any]], *, protocol: str = "") -> Figure:
    """Panels over optimizer steps: the loss and its parts; average mAP, if the run evaluated; learning rates; speed,
    wait for the loader and memory, if they were logged. `protocol` names the rules of the mAP on its axis.

    Raises ValueError if no row holds a loss.
    """
    train = [row for row in rows if row.get("kind", "train") == "train"]
    evaluations = [row for row in rows if row.get("kind") == "evaluation"]
    if not _series(train, "loss")[0].size:
        raise ValueError('the metrics hold no "loss" of a training step; let the run log at least one step')
    maps = _series(evaluations, "average_map")
    rates = sorted({key for row in train for key in row if key.startswith("lr/")})
    panels = ["loss", *(["mAP"] if maps[0].size else []), *(["lr"] if rates else [])]
    panels += [key for key in RESOURCES if _series(train, key)[0].size]
    figure = Figure(figsize=(9, 1 + 2.4 * (len(panels) + 0.5)), dpi=110, layout="constrained")
    # Without pyplot, whose figures are global and need a display.
    FigureCanvasAgg(figure)
    heights = [1.7 if panel == "loss" else 1.0 for panel in panels]
    grid = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for axes, panel in zip(grid, panels, strict=True):
        axes.grid(color="#E5E5E5", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
        match panel:
            case "loss":
                _draw_losses(axes, train)
            case "mAP":
                axes.plot(maps[0], 100 * maps[1], marker="o", markersize=4, color=COLOURS[0])
                axes.set_ylabel(f"average mAP, %\n({protocol})" if protocol else "average mAP, %")
                axes.set_ylim(bottom=0)
            case "lr":
                for index, (label, key) in enumerate(_distinct(train, rates).items()):
                    axes.plot(*_series(train, key), label=label, **_look(index))
                axes.set_ylabel("learning rate")
                axes.set_ylim(bottom=0)
                axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
                axes.legend(frameon=False, fontsize=8, ncols=2)
            case _:
                axes.plot(*_series(train, panel), **_look(0))
                axes.set_ylabel(RESOURCES[panel])
                axes.set_ylim(0, 1.05 * axes.get_ylim()[1])  # a level line is not the edge
    grid[-1].set_xlabel("optimizer step")
    grid[-1].xaxis.set_major_locator(MaxNLocator(10, integer=True))
    grid[-1].set_xlim(left=0)
    return figure


def smooth(values: np.ndarray, *, window: int) -> np.ndarray:
    """(N,) -> (N,) centred mean over `window` values, an odd number, fewer at both ends; NaN counts for nothing."""
    half = window // 2
    pieces = [values[max(0, index - half) : index + half + 1] for index in range(len(values))]
    finite = [piece[np.isfinite(piece)] for piece in pieces]
    return np.array([piece.mean() if piece.size else np.nan for piece in finite])


def _draw_losses(axes: Axes, train: Sequence[Mapping[str, Any]]) -> None:
    steps, losses = _series(train, "loss")
    # Odd, a twentieth of the run: the curve keeps its shape and loses its noise.
    window = 2 * (len(losses) // 40) + 1
    if window > 1:
        axes.plot(steps, losses, color="#999999", linewidth=0.8, alpha=0.7, label="loss, as logged")
    axes.plot(
        steps,
        smooth(losses, window=window) if window > 1 else losses,
        color=COLOURS[0],
        linewidth=2,
        marker="o" if len(losses) == 1 else "",
        label=f"loss, mean of {window}" if window > 1 else "loss",
    )
    parts = sorted({key for row in train for key in row if key.startswith("loss/")})
    for index, key in enumerate(parts, start=1):
        part_steps, values = _series(train, key)
        axes.plot(part_steps, smooth(values, window=window), label=key.removeprefix("loss/"), **_look(index))
    finite = losses[np.isfinite(losses)]
    # A few first losses would press the rest of the curve flat.
    if finite.size and finite.min() > 0 and finite.max() > 20 * np.median(finite):
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=min(0.0, float(finite.min(initial=0.0))))
    axes.set_ylabel("loss")
    axes.legend(frameon=False, fontsize=8, ncols=2)


def _distinct(rows: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> dict[str, str]:
    """Label -> key of each series that differs from the others: parameter groups mostly share their learning rate."""
    names: dict[bytes, list[str]] = {}
    for key in keys:
        # As bytes: equal to the last bit, NaN included, which is not equal to itself.
        names.setdefault(np.concatenate(_series(rows, key)).tobytes(), []).append(key)
    # "lr/backbone, decayed" -> "backbone"
    groups = [(keys, dict.fromkeys(key.split("/")[1].split(",")[0] for key in keys)) for keys in names.values()]
    short = [", ".join(labels) for _, labels in groups]
    return {
        label if short.count(label) == 1 else keys[0].removeprefix("lr/"): keys[0]
        for (keys, _), label in zip(groups, short, strict=True)
    }


def _look(index: int) -> dict[str, Any]:
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": STYLES[index % len(STYLES)], "linewidth": 1.4}


def _series(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the rows that hold a number under `key`; a NaN is kept, and shows as a gap."""
    pairs = [(row["step"], float(row[key])) for row in rows if isinstance(row.get(key), (int, float))]
    steps, values = (np.array(column, dtype=np.float64) for column in zip(*pairs, strict=True)) if pairs else ([], [])
    values = np.asarray(values)
    return np.asarray(steps), np.where([math.isfinite(value) for value in values], values, np.nan) if pairs else values
