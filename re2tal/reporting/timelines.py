"""Predicted and true actions on the time axis of one video: a picture per video.

    jump      ████████            ███████        true
              ▓▓▓▓▓▓▓▓▓  ░░░░                    predicted; the fainter, the lower its score
    run             ████████
                     ▓▓▓▓▓▓▓▓▓▓
              0     10     20     30  seconds

Colours are of Okabe and Ito's palette, which is safe for colour-blind readers; brightness differs as well.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb, to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from re2tal.evaluation.matching import find_matches
from re2tal.evaluation.protocols import PROTOCOLS
from re2tal.structures import Detections, VideoRecord

TRUE_COLOUR = "#333333"
RIGHT_COLOUR = "#0072B2"
WRONG_COLOUR = "#D55E00"
OPEN_COLOUR = "#7A4FB5"
"""predictions where no truth is known"""
MATCH_TIOU = 0.5
TRUE_OPACITY = 0.75
"""below 1, so that the outlines tell two actions apart where one begins as the other ends"""
MAX_LANES = 3
"""what overlaps in time of one class, true or predicted, has this many lanes; more than that cover each other"""
NAME_WIDTH = 28
"""characters of a class name on each of two lines"""
ID_WIDTH = 50
"""characters of a video's id"""


@dataclass(frozen=True, slots=True)
class Row:
    """One class: true segments, and predictions by falling score."""

    label: str
    true: np.ndarray
    """(M, 2) seconds"""
    true_lanes: np.ndarray
    """(M,) int, from the top"""
    predicted: np.ndarray
    """(N, 2) seconds"""
    scores: np.ndarray
    """(N,) clipped to [0, 1]"""
    right: np.ndarray
    """(N,) bool: takes a true action of this class at tIoU >= 0.5"""
    lanes: np.ndarray
    """(N,) int, below those of the truth"""

    @property
    def num_lanes(self) -> int:
        """Those of the truth, and those of predictions."""
        return self.first_lane + int(self.lanes.max(initial=-1)) + 1

    @property
    def first_lane(self) -> int:
        """The first lane of predictions."""
        return int(self.true_lanes.max(initial=-1)) + 1


def draw_timeline(
    record: VideoRecord,
    detections: Detections,
    *,
    classes: Sequence[str],
    has_truth: bool = True,
    is_length_known: bool = True,
    max_detections: int = 20,
    max_rows: int = 14,
) -> Figure:
    """One row per class that is true or predicted; in it the truth above the predictions, opacity for the score.

    Without `has_truth`, nothing is known of the video's true actions, and no prediction is called right or wrong.
    Without `is_length_known`, the record's duration is a stand-in, which is not shown.

    Drawn are the best `max_detections` predictions, or twice as many as there are true actions if that is more, and at
    most `max_rows` classes, true ones first; a note says what was left out.
    """
    rows, note = _rows(record, detections, classes=classes, max_detections=max_detections, max_rows=max_rows)
    heights = np.array([0.45 + 0.4 * row.num_lanes for row in rows])
    figure = Figure(figsize=(11, 1.5 + 0.5 * float(heights.sum())), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    tops = np.concatenate([[0.0], np.cumsum(heights)])
    # Actions may reach beyond the video, and are shown there.
    ends = (float(segments.max(initial=0)) for row in rows for segments in (row.true, row.predicted))
    end = max([record.duration_seconds, *ends])
    for row, top, height in zip(rows, tops[:-1], heights, strict=True):
        _draw_row(axes, row, top=float(top), end=end, has_truth=has_truth)
        axes.axhline(float(top + height), color="#DDDDDD", linewidth=0.8, zorder=0)
    names = [textwrap.fill(row.label, NAME_WIDTH, max_lines=2, placeholder=" …") for row in rows]
    axes.set_yticks(tops[:-1] + heights / 2, names, fontsize=9)
    if not rows:
        nothing = "no action is annotated, none was predicted" if has_truth else "no action was predicted"
        axes.text(0.5, 0.5, nothing, ha="center", transform=axes.transAxes)
    axes.set_xlim(0, end)
    # From the top; matplotlib warns of an axis without extent.
    axes.set_ylim(float(tops[-1]) or 1.0, 0)
    axes.set_xlabel("seconds")
    axes.xaxis.set_major_locator(MaxNLocator(12))
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    if has_truth and is_length_known:
        axes.axvline(record.duration_seconds, color=TRUE_COLOUR, linewidth=0.8, linestyle=":")
    length = f"{record.duration_seconds:.1f} s" if is_length_known else "length not known"
    if not has_truth:
        length = "no true actions known"
    # On lines of their own: a long id would push the rest out of the picture, and one in Arabic would mix with it.
    name = record.video_id if len(record.video_id) <= ID_WIDTH else f"{record.video_id[:ID_WIDTH]}…"
    axes.set_title(f"{name}\n{length}{note}", loc="left", fontsize=11)
    _add_legend(figure, has_truth=has_truth)
    # An id or a class may hold dollar signs, which would start a formula.
    for text in (*axes.get_yticklabels(), axes.title, axes._left_title):  # type: ignore[attr-defined]
        text.set_parse_math(False)
    return figure


def _rows(
    record: VideoRecord, detections: Detections, *, classes: Sequence[str], max_detections: int, max_rows: int
) -> tuple[list[Row], str]:
    scores = detections.scores.detach().cpu().double().numpy()
    best = np.argsort(-scores, kind="stable")[: max(max_detections, 2 * len(record.actions))]
    segments = detections.segments.detach().cpu().double().numpy().reshape(-1, 2)[best]
    names = np.array([classes[label] for label in detections.labels.tolist()], dtype=object)[best]
    # True classes by their first action, then the others by their best score: dict.fromkeys keeps first appearances.
    true_labels = dict.fromkeys(action.label for action in sorted(record.actions, key=lambda one: one.start_seconds))
    labels = list(dict.fromkeys([*true_labels, *names]))
    rows = [
        _row(label, record, segments[names == label], scores[best][names == label].clip(0, 1))
        for label in labels[:max_rows]
    ]
    left_out = []
    if len(best) < len(scores):
        left_out.append(f"best {len(best)} of {len(scores)} predictions")
    if len(labels) > max_rows:
        left_out.append(f"{max_rows} of {len(labels)} classes")
    return rows, f"   ({', '.join(left_out)})" if left_out else ""


def _row(label: str, record: VideoRecord, predicted: np.ndarray, scores: np.ndarray) -> Row:
    own = sorted((one.start_seconds, one.end_seconds) for one in record.actions if one.label == label)
    true = np.array(own, dtype=np.float64).reshape(-1, 2)
    partners = find_matches(
        np.zeros(len(predicted), dtype=np.int64),
        predicted,
        np.zeros(len(true), dtype=np.int64),
        true,
        protocol=PROTOCOLS["opentad"],
        thresholds=np.array([MATCH_TIOU]),
    )[0]
    return Row(label, true, _lanes(true), predicted, scores, partners >= 0, _lanes(predicted))


def _lanes(segments: np.ndarray) -> np.ndarray:
    """(N, 2) in their order -> (N,) the highest lane that is free there, else the last."""
    lanes = np.zeros(len(segments), dtype=np.int64)
    for index, (start, end) in enumerate(segments):
        overlapping = (segments[:index, 0] < end) & (segments[:index, 1] > start)
        taken = set(lanes[:index][overlapping].tolist())
        lanes[index] = next((lane for lane in range(MAX_LANES) if lane not in taken), MAX_LANES - 1)
    return lanes


def _draw_row(axes: Axes, row: Row, *, top: float, end: float, has_truth: bool) -> None:
    for lane in range(row.first_lane):
        true = row.true[row.true_lanes == lane]
        alphas = np.full(len(true), TRUE_OPACITY)
        _bars(axes, true, top + 0.2 + 0.4 * lane, colour=TRUE_COLOUR, alphas=alphas, name="true")
    alphas = 0.15 + 0.85 * row.scores
    lane_tops = top + 0.2 + 0.4 * (row.first_lane + np.arange(MAX_LANES))
    wrong = (WRONG_COLOUR, "wrong") if has_truth else (OPEN_COLOUR, "open")
    for lane in range(MAX_LANES):
        for verdict, colour, name in ((True, RIGHT_COLOUR, "right"), (False, *wrong)):
            chosen = (row.lanes == lane) & (row.right == verdict)
            _bars(axes, row.predicted[chosen], lane_tops[lane], colour=colour, alphas=alphas[chosen], name=name)
    for (start, stop), score, right, alpha, lane in zip(
        row.predicted, row.scores, row.right, alphas, row.lanes, strict=True
    ):
        # In the last lane predictions lie upon each other, and so would their scores.
        crowded = lane == MAX_LANES - 1
        if stop - start > 0.035 * end and not crowded:
            axes.text(
                (start + stop) / 2,
                lane_tops[lane] + 0.18,
                f"{score:.2f}",
                ha="center",
                va="center",
                fontsize=7,
                color=_ink(RIGHT_COLOUR if right else wrong[0], alpha),
                clip_on=True,
            )


def _bars(axes: Axes, segments: np.ndarray, top: float, *, colour: str, alphas: Iterable[float], name: str) -> None:
    if not len(segments):
        return
    spans = [(start, stop - start) for start, stop in segments.tolist()]
    # The outline keeps a one-second action visible in an hour of video, and a faint one recognisable.
    bars = axes.broken_barh(spans, (top, 0.34), edgecolor=colour, linewidth=0.7)
    bars.set_facecolor([to_rgba(colour, float(alpha)) for alpha in alphas])
    bars.set_gid(name)


def _add_legend(figure: Figure, *, has_truth: bool) -> None:
    verdicts = [
        Patch(color=TRUE_COLOUR, label="true"),
        Patch(color=RIGHT_COLOUR, label=f"predicted: true positive (tIoU ≥ {MATCH_TIOU})"),
        Patch(color=WRONG_COLOUR, label="predicted: false positive"),
    ]
    handles = [
        *(verdicts if has_truth else [Patch(color=OPEN_COLOUR, label="predicted")]),
        Patch(facecolor="#00000026", edgecolor="#000000", linewidth=0.7, label="fainter: lower score"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=9)


def _ink(colour: str, alpha: float) -> str:
    """White or black, whichever WCAG's formula says stands out more on the colour over white."""
    over_white = np.array([alpha * part + 1 - alpha for part in to_rgb(colour)])
    linear = np.where(over_white <= 0.04045, over_white / 12.92, ((over_white + 0.055) / 1.055) ** 2.4)
    return "white" if linear @ (0.2126, 0.7152, 0.0722) < 0.179 else "black"
