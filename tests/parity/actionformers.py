"""Builds our ActionFormer as a reference case describes it, under either public implementation's configuration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from parity.vectors import Case

from re2tal.evaluation.suppression import SuppressionConfig
from re2tal.localizers import ActionFormerConfig, build_localizer
from re2tal.localizers.pyramid.localizer import PyramidLocalizer
from re2tal.localizers.weights import import_weights
from re2tal.structures import Action, Timeline

STEPS = Timeline(start_seconds=0.0, seconds_per_step=1.0, duration_seconds=1e6)
"""A timeline on which a second is a step, for cases whose times are steps."""


def opentad_config(config: dict[str, Any]) -> ActionFormerConfig:
    """Where an argument is not given, OpenTAD's default."""
    projection, head, processing = config["projection"], config["rpn_head"], config.get("post_processing", {})
    num_convs, num_stem_blocks, _ = projection.get("arch", (2, 2, 5))
    return ActionFormerConfig(
        channels=projection["out_channels"],
        num_heads=projection["attn_cfg"]["n_head"],
        num_embedding_convs=num_convs,
        num_stem_blocks=num_stem_blocks,
        head_channels=head["feat_channels"],
        num_head_convs=head.get("num_convs", 3),
        kernel_size=projection["conv_cfg"]["kernel_size"],
        attention_window=_window(projection["attn_cfg"].get("n_mha_win_size", -1)),
        position_encoding=projection.get("use_abs_pe", False),
        max_num_steps=projection.get("max_seq_len", 2304),
        regression_ranges=_pairs(head["prior_generator"]["regression_range"]),
        centre_radius=head.get("center_sample_radius", 1.5),
        label_smoothing=head.get("label_smoothing", 0.0),
        regression_weight=head.get("loss_weight", 1.0),
        initial_positives=head.get("loss_normalizer", 100),
        positives_momentum=head.get("loss_normalizer_momentum", 0.9),
        path_drop=0.0,
        candidate_min_score=processing.get("pre_nms_thresh", 0.001),
        candidate_top_k=processing.get("pre_nms_topk", 2000),
    )


def original_config(config: dict[str, Any]) -> ActionFormerConfig:
    arguments = config["arguments"]
    training, testing = arguments["train_cfg"], arguments["test_cfg"]
    return ActionFormerConfig(
        variant="original",
        channels=arguments["embd_dim"],
        num_heads=arguments["n_head"],
        num_embedding_convs=arguments["backbone_arch"][0],
        num_stem_blocks=arguments["backbone_arch"][1],
        head_channels=arguments["head_dim"],
        num_head_convs=arguments["head_num_layers"] - 1,
        kernel_size=arguments["embd_kernel_size"],
        attention_window=_window(arguments["n_mha_win_size"]),
        position_encoding=arguments["use_abs_pe"],
        max_num_steps=arguments["max_seq_len"],
        regression_ranges=_pairs(arguments["regression_range"]),
        centre_radius=training["center_sample_radius"],
        label_smoothing=training["label_smoothing"],
        regression_weight=training["loss_weight"],
        initial_positives=training["init_loss_norm"],
        path_drop=0.0,
        candidate_min_score=testing["pre_nms_thresh"],
        candidate_top_k=testing["pre_nms_topk"],
        candidate_min_steps=testing["duration_thresh"],
    )


def suppression(nms: dict[str, Any]) -> SuppressionConfig:
    """Our configuration for the keyword arguments of OpenTAD's batched NMS."""
    method = {1: "linear", 2: "gaussian", 3: "gaussian_above"}[nms.get("method", 2)] if nms["use_soft_nms"] else "hard"
    voting = nms.get("voting_thresh", 0.0)
    return SuppressionConfig(
        method=method,
        sigma=nms["sigma"],
        iou_threshold=nms.get("iou_threshold", 0.0),
        overlap_base=nms.get("t1", 0.0),
        overlap_slope=nms.get("t2", 0.0),
        min_score=nms.get("min_score", 0.0),
        max_per_video=nms["max_seg_num"],
        per_class=nms["multiclass"],
        # The peer ignores the threshold when it suppresses class by class.
        voting_threshold=None if nms["multiclass"] or voting == 0.0 else voting,
    )


def original_suppression(config: dict[str, Any]) -> SuppressionConfig:
    """Our configuration for the test settings of the original ActionFormer."""
    testing = config["arguments"]["test_cfg"]
    nms = {
        "use_soft_nms": testing["nms_method"] == "soft",
        "sigma": testing["nms_sigma"],
        "iou_threshold": testing["iou_threshold"],
        "min_score": testing["min_score"],
        "max_seg_num": testing["max_seg_num"],
        "multiclass": testing["multiclass_nms"],
        "voting_thresh": testing["voting_thresh"],
    }
    return replace(suppression(nms), weigh_votes_by_overlap=True)


def build(case: Case, *, layout: str) -> PyramidLocalizer:
    """The case's localizer with its weights, float32, in training mode; its classes are called "0", "1", ..."""
    if layout == "opentad":
        config, in_channels = opentad_config(case.config), case.config["projection"]["in_channels"]
        num_classes = case.config["rpn_head"]["num_classes"]
    else:
        config, in_channels = original_config(case.config), case.config["arguments"]["input_dim"]
        num_classes = case.config["arguments"]["num_classes"]
    localizer = build_localizer(config, in_channels=in_channels, classes=[str(i) for i in range(num_classes)])
    assert isinstance(localizer, PyramidLocalizer)
    localizer.load_state_dict(import_weights(case.state, localizer=localizer, layout=layout))
    return localizer


def actions(segments: torch.Tensor, labels: torch.Tensor) -> list[Action]:
    """Ground truth in steps, for use with `STEPS`."""
    return [
        Action(start, end, str(label)) for (start, end), label in zip(segments.tolist(), labels.tolist(), strict=True)
    ]


def batch_actions(case: Case) -> list[list[Action]]:
    """The actions of every clip of a case, in steps."""
    return [
        actions(case.tensor(f"gt_segments_{clip}"), case.tensor(f"gt_labels_{clip}"))
        for clip in case.clips("gt_segments_")
    ]


def timeline(meta: dict) -> Timeline:
    """OpenTAD's conversion to seconds for one clip: of a whole video, resized, or of a window at its own frame rate."""
    duration = meta["duration"]
    if "resize_length" in meta:
        return Timeline(0.0, duration / meta["resize_length"], duration)
    start_frame = meta.get("window_start_frame", 0) + meta["offset_frames"]
    return Timeline(start_frame / meta["fps"], meta["snippet_stride"] / meta["fps"], duration)


def _window(window: int | Sequence[int]) -> int | tuple[int | None, ...] | None:
    if isinstance(window, int):
        return window if window > 1 else None
    return tuple(w if w > 1 else None for w in window)


def _pairs(ranges: Sequence[Sequence[float]]) -> tuple[tuple[float, float], ...]:
    return tuple((low, high) for low, high in ranges)
