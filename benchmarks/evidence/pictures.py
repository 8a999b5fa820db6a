"""Plots of the evidence, as SVG that is the same for the same figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib as mpl

mpl.use("svg")
mpl.rcParams["svg.hashsalt"] = "re2tal"
mpl.rcParams["svg.fonttype"] = "none"

import matplotlib.pyplot as plt  # noqa: E402  the backend is chosen before


def bars(path: Path, heights: Mapping[str, Sequence[float]], *, label: str) -> None:
    """A bar for the mean of each, in percent, and a dot for every run."""
    figure, axes = plt.subplots(figsize=(7, 0.5 * len(heights) + 1))
    for place, values in enumerate(heights.values()):
        axes.barh(place, 100 * sum(values) / len(values), color="#7fa8c9")
        axes.plot([100 * value for value in values], [place] * len(values), "k.", markersize=4)
    axes.set_yticks(range(len(heights)), [fill(name, 32) for name in heights])
    axes.invert_yaxis()
    axes.set_xlabel(label)
    _save(figure, path)


def lines(path: Path, curves: Mapping[str, Mapping[float, float]], *, x: str, y: str, log: bool = False) -> None:
    """One line for each curve, x -> y; those whose names end in "modelled" are dotted, without marks."""
    figure, axes = plt.subplots(figsize=(6, 3.2))
    for name, points in curves.items():
        style: dict[str, Any] = {"marker": "o", "markersize": 4}
        if name.endswith("modelled"):
            style = {"linestyle": ":", "color": "black"}
        axes.plot(list(points), list(points.values()), label=name, **style)
    if not log:
        axes.set_xticks(sorted({place for points in curves.values() for place in points}))
        axes.set_ylim(bottom=0)
    if log:
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.legend(fontsize=8)
    _save(figure, path)


def _save(figure: plt.Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
