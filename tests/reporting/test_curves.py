"""The curves of a run, read from the figure itself."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes

from re2tal.reporting.curves import draw_curves, read_metrics, smooth
from re2tal.reporting.fonts import to_png


def train(step: int, loss: float, **more: float) -> dict:
    return {"step": step, "kind": "train", "loss": loss, **more}


def line(axes: Axes, label: str) -> tuple[list[float], list[float]]:
    (found,) = [one for one in axes.lines if one.get_label() == label]
    return list(map(float, found.get_xdata())), list(map(float, found.get_ydata()))


def test_loss_parts_rates_and_map_are_drawn() -> None:
    rows = [
        train(10, 2.0, **{"loss/classification": 1.5, "lr/backbone": 1e-4, "lr/localizer": 1e-3}),
        train(20, 1.0, **{"loss/classification": 0.5, "lr/backbone": 5e-5, "lr/localizer": 5e-4}),
        {"step": 20, "kind": "evaluation", "average_map": 0.4, "loss": 99.0},
    ]
    losses, maps, rates = draw_curves(rows).axes
    assert line(losses, "loss") == ([10, 20], [2.0, 1.0])
    assert line(losses, "classification") == ([10, 20], [1.5, 0.5])
    assert [float(y) for y in maps.lines[0].get_ydata()] == [40.0]
    assert line(rates, "localizer") == ([10, 20], [1e-3, 5e-4])
    assert rates.get_xlabel() == "optimizer step"


def test_equal_learning_rates_are_one_line() -> None:
    keys = ("lr/backbone, decayed", "lr/backbone, not decayed", "lr/localizer, decayed", "lr/localizer, not decayed")
    for rates, expected in (
        ((1e-3, 1e-3, 1e-3, 1e-3), ["backbone, localizer"]),
        ((1e-4, 1e-4, 1e-3, 1e-3), ["backbone", "localizer"]),
        ((1e-4, 1e-5, 1e-3, 1e-3), ["backbone, decayed", "backbone, not decayed", "localizer"]),
    ):
        rows = [train(step, 1.0, **dict(zip(keys, rates, strict=True))) for step in (1, 2)]
        assert [one.get_label() for one in draw_curves(rows).axes[1].lines] == expected


def test_a_run_that_never_evaluated_has_no_panel_for_it() -> None:
    figure = draw_curves([train(1, 1.0)])
    assert len(figure.axes) == 1
    assert figure.axes[0].lines[0].get_marker() == "o"  # one point would be no line
    assert to_png(figure).startswith(b"\x89PNG")


def test_a_loss_that_is_not_finite_is_a_gap() -> None:
    (axes,) = draw_curves([train(1, 1.0), train(2, float("nan")), train(3, float("inf")), train(4, 0.5)]).axes
    assert np.isnan(line(axes, "loss")[1][1:3]).all()
    assert axes.get_ylim()[1] < 2


def test_a_loss_that_explodes_is_shown_on_a_logarithmic_axis() -> None:
    (axes,) = draw_curves([train(step, 1e6 if step == 1 else 1.0) for step in range(1, 20)]).axes
    assert axes.get_yscale() == "log"


def test_a_long_loss_is_drawn_as_logged_and_smoothed() -> None:
    (axes,) = draw_curves([train(step, float(step % 2)) for step in range(100)]).axes
    assert line(axes, "loss, as logged")[1] == [float(step % 2) for step in range(100)]
    assert line(axes, "loss, mean of 5")[1][50] == pytest.approx(0.4)


def test_smoothing_is_a_centred_mean_that_passes_over_gaps() -> None:
    values = np.array([1.0, 2.0, np.nan, 4.0, 5.0])
    assert smooth(values, window=3).tolist() == [1.5, 1.5, 3.0, 4.5, 4.5]
    assert smooth(np.array([np.nan]), window=1).tolist() == pytest.approx([np.nan], nan_ok=True)


def test_metrics_without_a_loss_are_refused() -> None:
    with pytest.raises(ValueError, match='the metrics hold no "loss" of a training step'):
        draw_curves([{"step": 1, "kind": "evaluation", "average_map": 0.1}])


def test_the_log_is_read_up_to_a_line_that_is_still_being_written(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(train(1, 1.0)) + "\n" + json.dumps(train(2, 0.5)) + "\n" + '{"step": 3, "lo')
    assert [row["step"] for row in read_metrics(path)] == [1, 2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"step": 1}\nnonsense\n', r"metrics\.jsonl, line 2, is not JSON"),
        ("[" * 100_000 + "\n", "line 1, is not JSON"),
        ('{"loss": 1}\n', 'line 1, has no whole number "step"'),
        ("[1]\n", 'line 1, has no whole number "step"'),
    ],
)
def test_a_damaged_log_is_named_by_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_metrics(tmp_path / "metrics.jsonl")


def test_a_missing_log_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"metrics\.jsonl is not a file; train first"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_speed_wait_and_memory_are_drawn_where_they_were_logged_and_the_protocol_stands_beside_the_map() -> None:
    rows = [
        train(10, 2.0, clips_per_second=3.0, loader_wait=0.25, peak_memory_gib=1.5),
        {"step": 10, "kind": "evaluation", "average_map": 0.4},
    ]
    _, maps, speed, wait, memory = draw_curves(rows, protocol="opentad").axes
    assert "opentad" in maps.get_ylabel()
    assert [float(y) for y in speed.lines[0].get_ydata()] == [3.0]
    assert [float(y) for y in wait.lines[0].get_ydata()] == [0.25]
    assert (memory.get_ylabel(), float(memory.lines[0].get_ydata()[0])) == ("peak memory, GiB", 1.5)
