"""Text tables, and that all that print one print what they did before they shared it, to the character."""

from __future__ import annotations

import numpy as np
import pytest

from re2tal.evaluation.average_precision import MapReport
from re2tal.evaluation.coverage import Coverage
from re2tal.rewire.report import RewireReport, StageReport
from re2tal.tables import text_table


def test_columns_are_aligned_and_lines_end_without_spaces() -> None:
    rows = [("stage", "runs", "seconds"), ("a", "stored", "1.5"), ("longer", "", "12.25"), ("all", "", "")]
    assert text_table(rows, align="<").split("\n") == [
        "stage   runs    seconds",
        "a       stored  1.5",
        "longer          12.25",
        "all",
    ]
    assert text_table(rows, align="<>", rules=(1, -1)).split("\n") == [
        "stage     runs  seconds",
        "-----------------------",
        "a       stored      1.5",
        "longer            12.25",
        "-----------------------",
        "all",
    ]


def test_the_last_alignment_holds_for_the_columns_that_follow_and_empty_columns_take_no_width() -> None:
    assert text_table([("a", "", "b", "c"), ("aa", "", "bb", "cc")], align="<>") == "a      b   c\naa    bb  cc"
    assert text_table([("a",), ("bb",)], align="<>") == "a\nbb"


def test_rows_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        text_table([("a", "b"), ("c",)], align="<")


def test_average_precision_prints_as_before() -> None:
    report = MapReport(
        protocol="official",
        tiou_thresholds=(0.5, 0.75),
        classes=("dive", "a longer name"),
        average_precision=np.array([[1.0, 0.25], [0.5, 0.125]]),
        num_truths=(3, 12),
        num_predictions=(40, 1000),
        coverage=Coverage("validation", 20, 5, False, 0, (), 1040, 1040, 1040, 20, {}, (), {}, {}, {}, ()),
    )
    assert str(report).split("\n") == [
        "AP in %, by tIoU; protocol official",
        report.coverage.facts(),
        "class          truths  predictions     0.5   0.75  average",
        "----------------------------------------------------------",
        "dive                3           40  100.00  50.00    75.00",
        "a longer name      12         1000   25.00  12.50    18.75",
        "----------------------------------------------------------",
        "mAP                15         1040   62.50  31.25    46.88",
    ]


def test_a_report_of_rewiring_prints_as_before() -> None:
    report = RewireReport(
        stages=(
            StageReport("layers.0", 2, 2, ("attention + mlp",), ()),
            StageReport("layers.1.blocks", 12, 0, (), ("12 x Block: no residual sum",)),
        ),
        outside=("stem: no residual blocks",),
    )
    assert str(report).split("\n") == [
        "stage            blocks  rewired  branches of a block  left alone, because",
        "layers.0         2       2        attention + mlp      -",
        "layers.1.blocks  12      0        -                    12 x Block: no residual sum",
        "",
        "outside of stages, left alone:",
        "  stem: no residual blocks",
    ]
