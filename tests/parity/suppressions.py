"""How a reference case suppresses detections, as our configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from parity.arguments import Arguments

from re2tal.evaluation.suppression import SuppressionConfig


def suppression(given: Mapping[str, Any]) -> SuppressionConfig:
    """Our configuration for the keyword arguments of OpenTAD's batched NMS."""
    with Arguments("nms", given) as nms:
        nms.drop("case", "set", "n_out", "order_stable_under_2e-7_score_noise")  # of a list of cases
        soft, per_class = nms.take("use_soft_nms", True), nms.take("multiclass", True)
        method = {1: "linear", 2: "gaussian", 3: "gaussian_above"}[nms.take("method", 2)]
        voting = nms.take("voting_thresh", 0.0)
        return SuppressionConfig(
            method=method if soft else "hard",
            sigma=nms.take("sigma", 0.5),
            iou_threshold=nms.take("iou_threshold", 0.0),
            overlap_base=nms.take("t1", 0.0),
            overlap_slope=nms.take("t2", 0.0),
            min_score=nms.take("min_score", 0.0),
            max_per_video=nms.take("max_seg_num", 100),
            per_class=per_class,
            # The peer ignores the threshold when it suppresses class by class.
            voting_threshold=None if per_class or voting == 0.0 else voting,
        )


ORIGINAL_SUPPRESSION = {
    "nms_sigma": "sigma",
    "iou_threshold": "iou_threshold",
    "min_score": "min_score",
    "max_seg_num": "max_seg_num",
    "multiclass_nms": "multiclass",
    "voting_thresh": "voting_thresh",
    "nms_method": "use_soft_nms",
}


def original_suppression(config: Mapping[str, Any]) -> SuppressionConfig:
    """Our configuration for the test settings of the original ActionFormer."""
    testing = config["arguments"]["test_cfg"]
    nms = {opentad: testing[original] for original, opentad in ORIGINAL_SUPPRESSION.items()}
    nms["use_soft_nms"] = {"soft": True, "hard": False}[nms["use_soft_nms"]]
    return replace(suppression(nms), weigh_votes_by_overlap=True)
