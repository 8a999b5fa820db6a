"""Precision over recall, mean over classes: the curves whose areas are the mAP of each tIoU threshold."""

from __future__ import annotations

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from re2tal.evaluation.average_precision import envelope, precision_of
from re2tal.evaluation.matching import Matches
from re2tal.reporting.curves import COLOURS, STYLES

RECALLS = np.linspace(0, 1, 101)


def precision_at(matches: Matches, recalls: np.ndarray = RECALLS) -> np.ndarray:
    """(T, R): by threshold, the highest precision at each recall or a later one, 0 past the last; mean over classes.

    Source: the interpolation of Pascal VOC 2010, as `evaluation.average_precision` integrates it.
    """
    by_class = zip(matches.partners, np.bincount(matches.truths.labels), strict=True)
    return np.mean([_of_class(partners >= 0, count, recalls) for partners, count in by_class], axis=0)


def _of_class(true_positive: np.ndarray, num_truths: int, recalls: np.ndarray) -> np.ndarray:
    """(T, N) bool by falling score -> (T, R)."""
    found, highest = np.cumsum(true_positive, axis=1), envelope(precision_of(true_positive))
    past_the_end = np.zeros((len(highest), 1))
    # 1e-9: a recall of 0.07 of 100 truths is 7 of them, not 7.000000000000001.
    first = [np.searchsorted(row, recalls * num_truths - 1e-9) for row in found]
    return np.take_along_axis(np.concatenate([highest, past_the_end], axis=1), np.array(first), axis=1)


def draw_precision_recall(matches: Matches) -> Figure:
    """A curve for each tIoU threshold."""
    figure = Figure(figsize=(6, 4.5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for index, (threshold, curve) in enumerate(zip(matches.thresholds, precision_at(matches), strict=True)):
        colour, style = COLOURS[index % len(COLOURS)], STYLES[index % len(STYLES)]
        axes.plot(RECALLS, curve, label=f"tIoU {threshold:.4g}", color=colour, linestyle=style)
    axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="recall", ylabel="precision, mean over classes")
    axes.set_title(f"protocol {matches.protocol.name}", loc="left", fontsize=11)
    axes.grid(color="#E5E5E5", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    return figure
