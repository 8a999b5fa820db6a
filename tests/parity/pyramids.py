"""Builds our localizers as a reference case describes them; what no option of ours can say is refused by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from parity.arguments import Arguments
from parity.suppressions import ORIGINAL_SUPPRESSION
from parity.vectors import Case

from re2tal.localizers import ActionFormerConfig, TemporalMaxerConfig, TriDetConfig, build_localizer
from re2tal.localizers.pyramid.localizer import PyramidLocalizer
from re2tal.localizers.weights import import_weights
from re2tal.structures import Action, Timeline

STEPS = Timeline(start_seconds=0.0, seconds_per_step=1.0, duration_seconds=1e6)
"""A timeline on which a second is a step, for cases whose times are steps."""


def opentad_config(config: Mapping[str, Any]) -> ActionFormerConfig:
    """Where an argument is not given, OpenTAD's default."""
    with _projection(config, "Conv1DTransformerProj") as projection:
        channels = projection.take("out_channels")
        num_convs, num_stem_blocks, num_branch = projection.take("arch", (2, 2, 5))
        projection.drop("path_pdrop", "input_pdrop")  # cases are without
        with projection.part("conv_cfg") as conv, projection.part("attn_cfg") as attention:
            conv.drop("proj_pdrop")
            attention.drop("attn_pdrop")
            return ActionFormerConfig(
                **_anchor_free(config, "ActionFormerHead", channels, num_branch),
                **_candidates(config),
                num_heads=attention.take("n_head", 4),
                attention_window=_window(attention.take("n_mha_win_size", -1)),
                num_embedding_convs=num_convs,
                num_stem_blocks=num_stem_blocks,
                kernel_size=conv.take("kernel_size"),
                position_encoding=projection.take("use_abs_pe", False),
                max_num_steps=projection.take("max_seq_len", 2304),
                path_drop=0.0,
            )


def temporalmaxer_config(config: Mapping[str, Any]) -> TemporalMaxerConfig:
    """Where an argument is not given, OpenTAD's default."""
    with _projection(config, "TemporalMaxerProj") as projection, projection.part("conv_cfg") as conv:
        channels = projection.take("out_channels")
        num_convs, _, num_branch = projection.take("arch", (2, 0, 5))
        projection.drop("drop_out")  # built with the rate of the case, then set to 0
        with Arguments("assigner", config["rpn_head"]["assigner"]) as assigner:
            assigner.only("type", "AnchorFreeSimOTAAssigner")
            return TemporalMaxerConfig(
                **_anchor_free(config, "TemporalMaxerHead", channels, num_branch, level_norm=_level_norm),
                **_candidates(config),
                num_embedding_convs=num_convs,
                kernel_size=conv.take("kernel_size"),
                centre_radius=assigner.take("center_radius", 2.5),
                match_iou_weight=assigner.take("iou_weight", 3.0),
                match_class_weight=assigner.take("cls_weight", 1.0),
                match_keep_share=assigner.take("keep_percent", 0.65),
                match_confused_weight=assigner.take("confuse_weight", 0.1),
                input_dropout=0.0,
            )


def tridet_config(config: Mapping[str, Any]) -> TriDetConfig:
    """Where an argument is not given, OpenTAD's default."""
    with _projection(config, "TriDetProj") as projection, projection.part("conv_cfg") as conv:
        channels = projection.take("out_channels")
        num_convs, num_stem, num_branch = projection.take("arch", (2, 2, 5))
        projection.drop("input_noise", "init_conv_vars", "path_pdrop")  # of training and of the start
        head = config["rpn_head"]
        return TriDetConfig(
            **_anchor_free(config, "TriDetHead", channels, num_branch),
            num_embedding_convs=num_convs,
            num_stem_blocks=num_stem,
            kernel_size=conv.take("kernel_size"),
            position_encoding=projection.take("use_abs_pe", False),
            max_num_steps=projection.take("max_seq_len", 2304),
            window=tuple(max(window, 1) for window in projection.take("sgp_win_size", (1,) * (num_branch + 1))),
            wide_ratio=projection.take("k", 1.5),
            mlp_channels=projection.take("sgp_mlp_dim"),
            downsampling={"max": "max", "avg": "average"}[projection.take("downsample_type", "max")],
            head_kernel_size=head.get("kernel_size", 3),
            boundary_kernel_size=head.get("boundary_kernel_size", 3),
            num_bins=head.get("num_bins", 16),
            iou_power=head.get("iou_weight_power", 0.2),
            path_drop=0.0,
        )


CONFIGS: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "ActionFormer": opentad_config,
    "TemporalMaxer": temporalmaxer_config,
    "TriDet": tridet_config,
}


def _projection(config: Mapping[str, Any], kind: str) -> Arguments:
    projection = Arguments("projection", config["projection"])
    projection.only("type", kind)
    projection.only("norm_cfg", {"type": "LN"})
    projection.drop("in_channels")
    return projection


def _level_norm(norm: Mapping[str, Any] | None) -> dict[str, Any]:
    match norm:
        case None:
            return {"level_norm": "none"}
        case {"type": "LN", **rest} if not rest:
            return {"level_norm": "layer"}
        case {"type": "GN", "num_groups": groups, **rest} if rest.keys() <= {"affine"}:
            affine = rest.get("affine", True)
            return {"level_norm": "group", "level_norm_groups": groups, "level_norm_affine": affine}
    raise ValueError(f"neck.norm_cfg: no level_norm of ours for {norm}")


def _anchor_free(
    config: Mapping[str, Any],
    kind: str,
    channels: int,
    num_branch: int,
    *,
    level_norm: Callable[[Any], dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """What all of OpenTAD's anchor-free heads take, and a neck that does no more than to normalise each level."""
    levels = range(num_branch + 1)
    with Arguments("neck", config["neck"]) as neck:
        for name, *accepted in (
            ("type", "FPNIdentity"),
            ("in_channels", channels),
            ("out_channels", channels),
            ("num_levels", len(levels)),
            ("scale_factor", 2.0),
            ("start_level", 0),
            ("end_level", -1, len(levels)),
        ):
            neck.only(name, *accepted)
        norm = neck.take("norm_cfg", {"type": "LN"})
        if level_norm is None and norm != {"type": "LN"}:
            raise ValueError(f"neck.norm_cfg is {norm}; ours is a LayerNorm per level")
    with Arguments("rpn_head", config["rpn_head"]) as head, head.part("prior_generator") as points:
        head.only("type", kind)
        head.only("in_channels", channels)
        losses = {"cls_loss": {"type": "FocalLoss"}, "reg_loss": {"type": "DIOULoss"}}
        head.only("loss", losses, losses | {"iou_rate": {"type": "GIOULoss"}})
        points.only("type", "PointGenerator")
        points.only("strides", tuple(2**level for level in levels))
        weight = head.take("loss_weight", 1.0)
        if weight <= 0:
            raise ValueError(f"rpn_head.loss_weight is {weight}; ours does not set itself")
        shared = {
            "channels": channels,
            "head_channels": head.take("feat_channels"),
            "num_head_convs": head.take("num_convs", 3),
            "prior_probability": head.take("cls_prior_prob", 0.01),
            "regression_ranges": points.take("regression_range"),
            "label_smoothing": head.take("label_smoothing", 0.0),
            "regression_weight": weight,
            "initial_positives": head.take("loss_normalizer", 100),
            "positives_momentum": head.take("loss_normalizer_momentum", 0.9),
        }
        head.only("filter_similar_gt", True)
        head.drop("num_classes", "assigner")
        if kind == "TriDetHead":
            head.drop("kernel_size", "boundary_kernel_size", "num_bins", "iou_weight_power")  # the caller's
        if kind != "TemporalMaxerHead":
            head.only("center_sample", "radius")
            shared["centre_radius"] = head.take("center_sample_radius", 1.5)
    return shared | (level_norm(norm) if level_norm else {})


def _candidates(config: Mapping[str, Any]) -> dict[str, Any]:
    processing = config.get("post_processing", {})
    return {
        "candidate_min_score": processing.get("pre_nms_thresh", 0.001),
        "candidate_top_k": processing.get("pre_nms_topk", 2000),
    }


def original_config(config: Mapping[str, Any]) -> ActionFormerConfig:
    """For the arguments of the original ActionFormer, all of which its configuration names."""
    with (
        Arguments("arguments", config["arguments"]) as model,
        model.part("train_cfg") as training,
        model.part("test_cfg") as testing,
    ):
        channels = model.take("embd_dim")
        num_convs, num_stem_blocks, num_branch = model.take("backbone_arch")
        for name, value in (
            ("backbone_type", "convTransformer"),
            ("fpn_type", "identity"),
            ("fpn_dim", channels),
            ("fpn_start_level", 0),
            ("scale_factor", 2),
            ("head_kernel_size", 3),
            ("use_rel_pe", False),
            *((f"{part}_with_ln", True) for part in ("embd", "fpn", "head")),
        ):
            model.only(name, value)
        model.drop("input_dim", "num_classes", "max_buffer_len_factor")
        training.only("center_sample", "radius")
        training.only("head_empty_cls", ())
        training.drop("clip_grad_l2norm", "dropout", "droppath")  # cases are without
        testing.only("ext_score_file", None)
        testing.drop(*ORIGINAL_SUPPRESSION)
        ranges = model.take("regression_range")
        assert len(ranges) == num_branch + 1
        return ActionFormerConfig(
            variant="original",
            channels=channels,
            num_heads=model.take("n_head"),
            num_embedding_convs=num_convs,
            num_stem_blocks=num_stem_blocks,
            head_channels=model.take("head_dim"),
            num_head_convs=model.take("head_num_layers") - 1,
            kernel_size=model.take("embd_kernel_size"),
            attention_window=_window(model.take("n_mha_win_size")),
            position_encoding=model.take("use_abs_pe"),
            max_num_steps=model.take("max_seq_len"),
            regression_ranges=ranges,
            centre_radius=training.take("center_sample_radius"),
            prior_probability=training.take("cls_prior_prob"),
            label_smoothing=training.take("label_smoothing"),
            regression_weight=training.take("loss_weight"),
            initial_positives=training.take("init_loss_norm"),
            path_drop=0.0,
            candidate_min_score=testing.take("pre_nms_thresh"),
            candidate_top_k=testing.take("pre_nms_topk"),
            candidate_min_steps=testing.take("duration_thresh"),
        )


def build(case: Case, *, layout: str = "opentad") -> PyramidLocalizer:
    """The case's localizer with its weights, float32, in training mode; its classes are called "0", "1", ..."""
    if layout == "opentad":
        parts = case.config.get("detector", {"type": "ActionFormer"} | case.config)
        settings = {key: case.config[key] for key in ("post_processing",) if key in case.config}
        config = CONFIGS[parts["type"]](parts | settings)
        in_channels, num_classes = parts["projection"]["in_channels"], parts["rpn_head"]["num_classes"]
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


def _window(window: int | tuple[int, ...]) -> int | tuple[int | None, ...] | None:
    if isinstance(window, int):
        return window if window > 1 else None
    return tuple(w if w > 1 else None for w in window)
