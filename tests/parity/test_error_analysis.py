"""The diagnosis of errors against DETAD's own numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from parity.vectors import vectors_dir

from re2tal.evaluation.error_analysis import ERRORS, ErrorReport, analyse_errors
from re2tal.evaluation.ground_truth import read_ground_truth
from re2tal.evaluation.results import read_results
from re2tal.strict_json import read_json

CASES = sorted(path.stem.split("_")[1] for path in vectors_dir().glob("detad_*_gt.json"))
close = pytest.approx


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[ErrorReport, dict[str, Any], list[int]]:
    """Our report, their numbers, and the place of each of our classes among theirs."""
    theirs = read_json(vectors_dir() / f"detad_{request.param}.json")
    results = read_results(vectors_dir() / f"detad_{request.param}_pred.json")
    report = analyse_errors(
        results.predictions,
        read_ground_truth(vectors_dir() / f"detad_{request.param}_gt.json", subset=theirs["subset"]),
        classes=results.classes,
        tiou_thresholds=theirs["tiou_thresholds"],
        sizes_of="thumos14" if theirs["kind"] == "thumos" else "activitynet",
        per_action=theirs["limit_factor"],
    )
    return report, theirs, [theirs["class_order"].index(name) for name in report.classes]


def test_wrong_predictions_have_their_types_and_cost(case) -> None:
    report, theirs, order = case
    theirs = theirs["false_positive"]
    assert report.types.shape[1] == theirs["predictions_kept"]
    assert report.average_precision == close(np.array(theirs["ap_normalized"])[:, order], abs=1e-9)
    counts = [list(row.values()) for row in theirs["counts_all"].values()]
    assert [list(row.values()) for row in report.to_json()["counts"]] == counts
    for group, wanted in zip(report.profile, theirs["profile"], strict=True):
        assert group.tolist() == [list(row.values()) for name, row in wanted["counts"].items() if name != "avg"]
    assert list(report.gains) == list(ERRORS)
    for ours, wanted in zip(report.gains.values(), theirs["ap_gain"].values(), strict=True):
        assert ours == close(np.array(wanted)[:, order], abs=1e-9)
    assert list(report.gain.values()) == close(list(theirs["average_mAP_gain"].values()), abs=1e-9)


def test_sensitivity_by_characteristic(case) -> None:
    report, theirs, order = case
    theirs = theirs["sensitivity"]
    assert report.all_average_precision == close(np.array(theirs["ap_normalized"])[:, order], abs=1e-9)
    for name, sizes in theirs["by_characteristic"].items():
        assert report.sensitivity[name] == close(sizes, abs=1e-9)


def test_missed_actions_by_characteristic_and_pair(case) -> None:
    report, theirs, _ = case
    for name, thresholds in theirs["false_negative"]["by_characteristic"].items():
        for place, sizes in enumerate(thresholds.values()):
            for size, wanted in sizes.items():
                share, missed = report.missed[name][size]
                at = missed.mean() if place == len(missed) else missed[place]
                assert (share, at) == close((wanted["all"], wanted["unmatched"]), abs=1e-9)
    for name, pairs in theirs["false_negative"]["by_pair_avg"].items():
        assert report.missed[name].keys() == pairs["avg"].keys()
        for pair, wanted in pairs["avg"].items():
            share, missed = report.missed[name][pair]
            assert (share, missed.mean()) == close((wanted["all"], wanted["unmatched"]), abs=1e-9)
