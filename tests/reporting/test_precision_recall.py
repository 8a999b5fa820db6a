"""Precision-recall curves against a case worked by hand, and against the mAP that they enclose."""

from __future__ import annotations

import numpy as np
import torch

from re2tal.evaluation.average_precision import mean_average_precision
from re2tal.evaluation.matching import match_predictions
from re2tal.reporting.precision_recall import RECALLS, draw_precision_recall, precision_at
from re2tal.structures import Action, Detections, VideoRecord


def detections(rows: list[tuple[float, float, float, int]]) -> Detections:
    segments = torch.tensor([row[:2] for row in rows], dtype=torch.float64)
    return Detections(segments, torch.tensor([row[2] for row in rows]), torch.tensor([row[3] for row in rows]))


def matched(truths: list[Action], found: Detections, thresholds: tuple[float, ...]):
    return match_predictions(
        {"v": found},
        [VideoRecord("v", "validation", 100.0, tuple(truths))],
        classes=("jump", "run"),
        protocol="opentad",
        tiou_thresholds=thresholds,
    )


def test_a_case_worked_by_hand() -> None:
    """Right, wrong, right of two: precision 1 up to recall 1/2, then 2/3 up to recall 1."""
    truths = [Action(0, 10, "jump"), Action(20, 30, "jump")]
    matches = matched(truths, detections([(0, 10, 0.9, 0), (50, 60, 0.8, 0), (20, 30, 0.7, 0)]), (0.5,))
    curve = precision_at(matches, np.array([0.0, 0.5, 0.51, 1.0]))
    np.testing.assert_allclose(curve, [[1, 1, 2 / 3, 2 / 3]])


def test_recall_that_is_never_reached_has_no_precision() -> None:
    truths = [Action(0, 10, "jump"), Action(20, 30, "jump"), Action(0, 5, "run")]
    curve = precision_at(matched(truths, detections([(0, 10, 0.9, 0)]), (0.5,)), np.array([0.0, 0.5, 0.6]))
    assert curve.tolist() == [[0.5, 0.5, 0.0]]  # of two classes, one was never predicted


def test_the_area_is_the_mean_average_precision() -> None:
    generator = torch.Generator().manual_seed(0)
    starts = torch.rand(40, generator=generator) * 80
    truths = [Action(float(s), float(s) + 5, ("jump", "run")[i % 2]) for i, s in enumerate(starts)]
    shifted = [(float(s) + i % 5, float(s) + i % 5 + 5, 1 - i / 50, i % 2) for i, s in enumerate(starts)]
    matches = matched(truths, detections(shifted), (0.3, 0.5, 0.7))
    fine = np.linspace(0, 1, 20_001)[1:]
    np.testing.assert_allclose(precision_at(matches, fine).mean(axis=1), mean_average_precision(matches).map, atol=1e-4)


def test_the_drawing_has_a_curve_for_each_threshold() -> None:
    matches = matched([Action(0, 10, "jump")], detections([(0, 10, 0.9, 0)]), (0.3, 0.7))
    (axes,) = draw_precision_recall(matches).axes
    assert [line.get_label() for line in axes.lines] == ["tIoU 0.3", "tIoU 0.7"]
    np.testing.assert_allclose(axes.lines[0].get_ydata(), np.ones(len(RECALLS)))
