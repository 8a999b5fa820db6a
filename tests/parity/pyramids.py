"""Builds our TemporalMaxer and TriDet as a case describes them; what no option of ours can say is refused by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from parity.vectors import Case

from re2tal.localizers import TemporalMaxerConfig, TriDetConfig, build_localizer
from re2tal.localizers.pyramid.localizer import PyramidLocalizer
from re2tal.localizers.weights import import_weights


class Arguments:
    """The arguments of one part of OpenTAD's configuration; each must be taken, once."""

    def __init__(self, case: Case, part: str) -> None:
        self._place = f"{case.name}: {part}"
        self._left = dict(case.config["detector"].get(part, {}) if part != "nms" else case.config[part])

    def take(self, name: str, default: Any = None) -> Any:
        """The argument, or OpenTAD's `default` where it is not given."""
        return self._left.pop(name, default)

    def only(self, name: str, *accepted: Any) -> None:
        """Takes an argument that we can only give these values, the first of them where it is not given."""
        value = self.take(name, accepted[0])
        if value not in accepted:
            raise ValueError(f"{self._place}.{name} is {value!r}; ours is one of {accepted}")

    def done(self) -> None:
        """ValueError for arguments that were not taken."""
        if self._left:
            raise ValueError(f"{self._place}: no option of ours for {self._left}")


def build(case: Case) -> PyramidLocalizer:
    """The case's localizer with its weights, float32, in training mode; its classes are called "0", "1", ..."""
    detector = case.config["detector"]
    localizer = build_localizer(
        CONFIGS[detector["type"]](case),
        in_channels=detector["projection"]["in_channels"],
        classes=[str(index) for index in range(detector["rpn_head"]["num_classes"])],
    )
    assert isinstance(localizer, PyramidLocalizer)
    localizer.load_state_dict(import_weights(case.state, localizer=localizer, layout="opentad"))
    return localizer


def temporalmaxer_config(case: Case) -> TemporalMaxerConfig:
    projection, head, neck = (Arguments(case, part) for part in ("projection", "rpn_head", "neck"))
    channels = projection.take("out_channels")
    num_convs, _, num_branch = projection.take("arch", (2, 0, 5))
    projection.only("type", "TemporalMaxerProj")
    projection.take("in_channels")
    projection.only("norm_cfg", {"type": "LN"})
    projection.take("drop_out")  # built with the rate of the case, then set to 0
    match neck.take("norm_cfg", {"type": "LN"}):
        case None:
            level_norm = {"level_norm": "none"}
        case {"type": "LN"}:
            level_norm = {"level_norm": "layer"}
        case {"type": "GN", "num_groups": groups, **rest} if rest.keys() <= {"affine"}:
            affine = rest.get("affine", True)
            level_norm = {"level_norm": "group", "level_norm_groups": groups, "level_norm_affine": affine}
        case other:
            raise ValueError(f"{case.name}: no level_norm of ours for {other}")
    assigner = head.take("assigner")
    if assigner.pop("type") != "AnchorFreeSimOTAAssigner":
        raise ValueError(f"{case.name}: ours is SimOTA")
    config = TemporalMaxerConfig(
        **_shared(case, head, neck, channels, num_branch),
        **level_norm,
        num_embedding_convs=num_convs,
        kernel_size=projection.take("conv_cfg")["kernel_size"],
        centre_radius=assigner.pop("center_radius", 2.5),
        match_iou_weight=assigner.pop("iou_weight", 3.0),
        match_class_weight=assigner.pop("cls_weight", 1.0),
        match_keep_share=assigner.pop("keep_percent", 0.65),
        match_confused_weight=assigner.pop("confuse_weight", 0.1),
        input_dropout=0.0,
        candidate_min_score=case.config["post_processing"].get("pre_nms_thresh", 0.001),
        candidate_top_k=case.config["post_processing"].get("pre_nms_topk", 2000),
    )
    if assigner:
        raise ValueError(f"{case.name}: no option of ours for {assigner}")
    for arguments in (projection, head, neck):
        arguments.done()
    return config


def tridet_config(case: Case) -> TriDetConfig:
    projection, head, neck = (Arguments(case, part) for part in ("projection", "rpn_head", "neck"))
    channels = projection.take("out_channels")
    num_convs, num_stem, num_branch = projection.take("arch", (2, 2, 5))
    projection.only("type", "TriDetProj")
    projection.take("in_channels")
    projection.only("norm_cfg", {"type": "LN"})
    projection.take("input_noise")  # of training only; the case is without
    projection.take("init_conv_vars")  # the case's weights are its own
    if projection.take("path_pdrop", 0.0) <= 0:
        raise ValueError(f"{case.name}: path_pdrop is 0; our strided blocks always have a learned scale")
    neck.only("norm_cfg", {"type": "LN"})
    head.only("center_sample", "radius")
    config = TriDetConfig(
        **_shared(case, head, neck, channels, num_branch),
        num_embedding_convs=num_convs,
        num_stem_blocks=num_stem,
        kernel_size=projection.take("conv_cfg")["kernel_size"],
        position_encoding=projection.take("use_abs_pe", False),
        max_num_steps=projection.take("max_seq_len", 2304),
        window=tuple(max(window, 1) for window in projection.take("sgp_win_size", (1,) * (num_branch + 1))),
        wide_ratio=projection.take("k", 1.5),
        mlp_channels=projection.take("sgp_mlp_dim"),
        downsampling={"max": "max", "avg": "average"}[projection.take("downsample_type", "max")],
        centre_radius=head.take("center_sample_radius", 1.5),
        head_kernel_size=head.take("kernel_size", 3),
        boundary_kernel_size=head.take("boundary_kernel_size", 3),
        num_bins=head.take("num_bins", 16),
        iou_power=head.take("iou_weight_power", 0.2),
        path_drop=0.0,
    )
    for arguments in (projection, head, neck):
        arguments.done()
    return config


CONFIGS: dict[str, Callable[[Case], Any]] = {"TemporalMaxer": temporalmaxer_config, "TriDet": tridet_config}


def _shared(case: Case, head: Arguments, neck: Arguments, channels: int, num_branch: int) -> Mapping[str, Any]:
    """What all of OpenTAD's anchor-free heads take."""
    points = head.take("prior_generator")
    levels = range(num_branch + 1)
    if points["type"] != "PointGenerator" or list(points["strides"]) != [2**level for level in levels]:
        raise ValueError(f"{case.name}: our strides are 1, 2, 4, ... on {len(levels)} levels, not {points}")
    head.take("type")
    head.take("num_classes")
    head.only("in_channels", channels)
    kinds = {"cls_loss": {"type": "FocalLoss"}, "reg_loss": {"type": "DIOULoss"}}
    head.only("loss", kinds, kinds | {"iou_rate": {"type": "GIOULoss"}})
    weight = head.take("loss_weight", 1.0)
    if weight <= 0:
        raise ValueError(f"{case.name}: loss_weight is {weight}; ours does not set itself")
    neck.only("type", "FPNIdentity")
    neck.only("in_channels", channels)
    neck.only("out_channels", channels)
    neck.only("num_levels", len(levels))
    neck.only("scale_factor", 2.0)
    neck.only("start_level", 0)
    neck.only("end_level", -1, len(levels))
    return {
        "channels": channels,
        "head_channels": head.take("feat_channels"),
        "num_head_convs": head.take("num_convs", 3),
        "prior_probability": head.take("cls_prior_prob", 0.01),
        "regression_ranges": tuple((low, high) for low, high in points["regression_range"]),
        "label_smoothing": head.take("label_smoothing", 0.0),
        "regression_weight": weight,
        "initial_positives": head.take("loss_normalizer", 100),
        "positives_momentum": head.take("loss_normalizer_momentum", 0.9),
    }
