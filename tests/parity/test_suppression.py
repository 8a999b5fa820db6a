"""Suppression and voting against OpenTAD's compiled NMS, and against what both public ActionFormers did with theirs."""

from __future__ import annotations

import pytest
import torch
from parity.detections import check_identical, check_same, stored
from parity.suppressions import original_suppression, suppression
from parity.vectors import cases, load, read_json

from re2tal.evaluation.suppression import SuppressionConfig, suppress, vote
from re2tal.structures import Detections

NMS = load("nms") if cases("nms") else None
NMS_CASES = read_json("nms_cases.json") if NMS else []
CLIPS = [
    (name, clip)
    for prefix in ("det_", "actionformer_", "vsgn_opentad")
    for name in cases(prefix)
    for clip in load(name).clips("pre_nms_segments_")
]
VOTING_TOLERANCE = 1e-4


@pytest.mark.parametrize("nms", NMS_CASES, ids=lambda nms: f"case{nms['case']:03d}")
def test_every_method_as_the_compiled_one(nms: dict) -> None:
    inputs = (NMS.tensor(f"set{nms['set']}_{part}") for part in ("segments", "scores", "labels"))
    outputs = (NMS.tensor(f"case{nms['case']:03d}_{part}") for part in ("segments", "scores", "labels"))
    ours, reference = suppress(Detections(*inputs), suppression(nms)), Detections(*outputs)
    segment = 0.0 if suppression(nms).voting_threshold is None else VOTING_TOLERANCE
    if nms["order_stable_under_2e-7_score_noise"]:
        check_identical(ours, reference, segment=segment)
    else:
        check_same(ours, reference, score=1e-5, segment=segment)


@pytest.mark.skipif(NMS is None, reason="no such vectors in this folder")
def test_votes_as_the_compiled_ones_neighbour() -> None:
    segments, scores = NMS.arrays["set0_segments"], NMS.arrays["set0_scores"]
    reference = NMS.arrays["voting_only"]
    ours = vote(segments[: len(reference)], segments, scores, threshold=0.7, weigh_by_overlap=False)
    torch.testing.assert_close(torch.from_numpy(ours), torch.from_numpy(reference), rtol=0, atol=VOTING_TOLERANCE)


@pytest.mark.parametrize(("name", "clip"), CLIPS, ids=str)
def test_stored_candidates_thin_out_as_in_their_detector(name: str, clip: int) -> None:
    case = load(name)
    config = suppression(case.config["nms"]) if "nms" in case.config else original_suppression(case.config)
    ours = suppress(stored(case.arrays, "pre_nms", clip), config)
    # Not rank by rank: last bits order scores that are nearly equal.
    check_same(ours, stored(case.arrays, "nms", clip), score=2e-6, segment=_tolerance(config))


def _tolerance(config: SuppressionConfig) -> float:
    return 0.0 if config.voting_threshold is None else VOTING_TOLERANCE
