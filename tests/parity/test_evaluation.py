"""The evaluator against ActivityNet's official code and OpenTAD's, both protocols, on stored ground truth."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from parity.vectors import cases, load, read_json, vectors_dir

from re2tal.evaluation.average_precision import MapReport, mean_average_precision
from re2tal.evaluation.matching import match_predictions
from re2tal.evaluation.protocols import PROTOCOLS
from re2tal.evaluation.recall import average_recall
from re2tal.evaluation.results import Results, read_results
from re2tal.structures import Action, VideoRecord

ARRAYS = load("eval").arrays if cases("eval") else {}
DATASETS = sorted(path.stem[len("eval_") : -len("_gt")] for path in vectors_dir().glob("eval_*_gt.json"))
SETTINGS = [
    (dataset, key.removeprefix(f"{dataset}_").removesuffix("_tiou"))
    for dataset in DATASETS
    for key in sorted(ARRAYS)
    if key.startswith(f"{dataset}_") and key.endswith("_tiou")
]
RECALLS = [
    (dataset, int(found[1]), found[2])
    for dataset in DATASETS
    for key in sorted(ARRAYS)
    if (found := re.fullmatch(rf"{re.escape(dataset)}_ar(\d+)_(official|opentad)_avg_recall", key))
]


def has_ties(dataset: str) -> bool:
    return any(key.startswith(f"{dataset}_") and key.endswith("_file_order_ap") for key in ARRAYS)


def ground_truth(dataset: str, subset: str = "validation") -> list[VideoRecord]:
    database = read_json(f"eval_{dataset}_gt.json")["database"]
    return [
        VideoRecord(
            video_id,
            entry["subset"],
            entry["duration"],
            tuple(Action(*annotation["segment"], annotation["label"]) for annotation in entry["annotations"]),
        )
        for video_id, entry in database.items()
        if entry["subset"] == subset
    ]


def predictions(dataset: str) -> Results:
    return read_results(vectors_dir() / f"eval_{dataset}_pred.json")


def evaluate(dataset: str, thresholds: np.ndarray, protocol: str, *, step: float = 0.0) -> MapReport:
    """Each score moved by `step` times its place in the file."""
    results = predictions(dataset)
    place = 0
    for video_id, one in results.predictions.items():
        moved = one.scores + step * torch.arange(place, place + len(one), dtype=torch.float64)
        results.predictions[video_id], place = replace(one, scores=moved), place + len(one)
    return mean_average_precision(
        match_predictions(
            results.predictions,
            ground_truth(dataset),
            classes=results.classes,
            protocol=protocol,
            tiou_thresholds=thresholds,
        )
    )


@pytest.mark.parametrize("protocol", ["official", "opentad"])
@pytest.mark.parametrize(("dataset", "setting"), [case for case in SETTINGS if not has_ties(case[0])])
def test_average_precision_is_that_of_the_published_code(dataset: str, setting: str, protocol: str) -> None:
    prefix = f"{dataset}_{setting}"
    report = evaluate(dataset, ARRAYS[f"{prefix}_tiou"], protocol)
    columns = [report.classes.index(name) for name in ARRAYS[f"{prefix}_classes"]]
    np.testing.assert_allclose(
        report.average_precision[:, columns], ARRAYS[f"{prefix}_{protocol}_ap"], rtol=0, atol=1e-9
    )
    np.testing.assert_allclose(report.map, ARRAYS[f"{prefix}_{protocol}_map"], rtol=0, atol=1e-9)
    assert report.average_map == pytest.approx(float(ARRAYS[f"{prefix}_{protocol}_avg"]), abs=1e-9)


@pytest.mark.parametrize("protocol", ["official", "opentad"])
@pytest.mark.parametrize(("dataset", "setting"), [case for case in SETTINGS if has_ties(case[0])])
def test_equal_scores(dataset: str, setting: str, protocol: str) -> None:
    """Told apart by the file's order, they give the published code's numbers for it; as they are, numbers of some
    order."""
    prefix, thresholds = f"{dataset}_{setting}", ARRAYS[f"{dataset}_{setting}_tiou"]
    classes = ARRAYS[f"{prefix}_classes"].tolist()
    for order, step in (("file_order", -1e-9), ("reverse_file_order", 1e-9)):
        report = evaluate(dataset, thresholds, protocol, step=step)
        ours = report.average_precision[:, list(map(report.classes.index, classes))]
        np.testing.assert_allclose(ours, ARRAYS[f"{prefix}_{order}_ap"], rtol=0, atol=1e-9)
        np.testing.assert_allclose(report.map, ARRAYS[f"{prefix}_{order}_map"], rtol=0, atol=1e-9)
    # The lowest and the highest of 200 random orders are not the extremes of all.
    lowest, highest = (ARRAYS[f"{prefix}_map_{end}"] for end in ("min", "max"))
    slack = 0.25 * (highest - lowest) + 1e-9
    report = evaluate(dataset, thresholds, protocol)
    assert (report.map >= lowest - slack).all()
    assert (report.map <= highest + slack).all()


@pytest.mark.parametrize(("dataset", "number", "protocol"), RECALLS)
def test_average_recall_is_that_of_the_published_code(dataset: str, number: int, protocol: str) -> None:
    results = predictions(dataset)
    report = average_recall(
        results.predictions,
        ground_truth(dataset),
        classes=results.classes,
        protocol=protocol,
        proposals_per_video=number,
    )
    prefix = f"{dataset}_ar{number}_{protocol}"
    if f"{prefix}_proposals_per_video" in ARRAYS:
        np.testing.assert_allclose(report.proposals_per_video, ARRAYS[f"{prefix}_proposals_per_video"], atol=1e-9)
    if has_ties(dataset):
        lowest, highest = recalls_over_tie_orders(dataset, number, protocol)
        for recall in (report.recall, ARRAYS[f"{prefix}_recall"]):
            assert (recall >= lowest - 1e-9).all()
            assert (recall <= highest + 1e-9).all()
        return
    np.testing.assert_allclose(report.recall, ARRAYS[f"{prefix}_recall"], rtol=0, atol=1e-9)
    np.testing.assert_allclose(report.average_recall, ARRAYS[f"{prefix}_avg_recall"], rtol=0, atol=1e-9)
    assert report.auc == pytest.approx(float(ARRAYS[f"{prefix}_auc"]), abs=1e-9)


def recalls_over_tie_orders(dataset: str, number: int, protocol: str) -> tuple[np.ndarray, np.ndarray]:
    """Bounds (T, P) on recall over all orders of equal scores: for every truth and threshold by itself, the proposals
    that reach it come last, or first, among their equals."""
    rules, thresholds = PROTOCOLS[protocol], np.linspace(0.5, 0.95, 10)
    proposals = predictions(dataset).predictions
    truths = {record.video_id: rules.select(record.actions) for record in ground_truth(dataset)}
    truths = {video_id: actions for video_id, actions in truths.items() if actions}
    total = sum(map(len, proposals.values()))
    sizes = {video_id: len(proposals[video_id]) for video_id in truths if video_id in proposals}
    kept = {video_id: min(int(size * (number * len(truths) / total)), size) for video_id, size in sizes.items()}
    points = 100 if protocol == "official" else number
    shares = np.arange(1, points + 1) / points * (number * len(truths) / sum(kept.values()))
    bounds = np.zeros((2, len(thresholds), points))
    for video_id, size in kept.items():
        segments, scores = proposals[video_id].segments.numpy(), proposals[video_id].scores.numpy()
        counts = np.minimum((size * shares).astype(int), size)
        for action in truths[video_id]:
            overlap = rules.tiou(segments, np.array([action.start_seconds, action.end_seconds]))
            for row, threshold in enumerate(thresholds):
                reaches = np.isfinite(overlap) & (overlap >= threshold)
                for bound, luck in enumerate((reaches, ~reaches)):
                    ranked = reaches[np.lexsort((luck, -scores))]
                    bounds[bound, row] += [ranked[:count].any() for count in counts]
    bounds /= sum(map(len, truths.values()))
    return bounds[0], bounds[1]
