"""VSGN against OpenTAD's, with and without the graph: features, predictions, losses, gradients, candidates, results."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from parity.arguments import Arguments
from parity.compare import Tolerances, check_gradients, largest_error
from parity.detections import check_same, from_results, rounded, stored
from parity.pyramids import STEPS, batch_actions, timeline
from parity.suppressions import suppression
from parity.vectors import Case, cases, load, read_json

from re2tal.evaluation.suppression import suppress
from re2tal.localizers import VSGNConfig, build_localizer
from re2tal.localizers.vsgn.anchors import balanced_bce, pyramid_anchors
from re2tal.localizers.vsgn.localizer import VSGN
from re2tal.localizers.weights import export_weights, import_weights, public_name
from re2tal.structures import Action, Detections, Features

OUTPUT_TOLERANCE = {torch.float32: 5e-5, torch.float64: 1e-7}
LOSS_TOLERANCE = 1e-5
GRADIENT_TOLERANCES = Tolerances(
    output={},
    grad_x={},
    loss={},
    norm={torch.float32: 0.0},
    norm_floor={torch.float32: 1e-3},
    probe={torch.float32: 1e-3},
)
LOSS_NAMES = {
    "loss_tem": "evaluation",
    "loss_stage1_reg": "regression",
    "loss_stage1_cls": "classification",
    "loss_stage2_loc": "adjustment",
    "cost": "total",
}
opentad_cases = pytest.mark.parametrize("name", cases("vsgn_opentad"))
both_precisions = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


def build(case: Case) -> VSGN:
    """The case's localizer with its weights; its classes are called "0", "1", ..."""
    detector = case.config["detector"]
    # The peer counts the background among the classes, unless there is a single one.
    num_classes = max(1, detector["rpn_head"]["num_classes"] - 1)
    localizer = build_localizer(
        opentad_config(detector),
        in_channels=detector["projection"]["in_channels"],
        classes=[str(index) for index in range(num_classes)],
    )
    assert isinstance(localizer, VSGN)
    localizer.load_state_dict(import_weights(case.state, localizer=localizer, layout="opentad"))
    return localizer


def opentad_config(detector: dict[str, Any]) -> VSGNConfig:
    with (
        Arguments("projection", detector["projection"]) as projection,
        Arguments("neck", detector["neck"]) as neck,
        Arguments("rpn_head", detector["rpn_head"]) as rpn,
        Arguments("roi_head", detector["roi_head"]) as roi,
        rpn.part("anchor_generator") as anchors,
        rpn.part("tem_head") as evaluation,
        rpn.part("loss_cls") as focal,
        roi.part("roi_extractor") as extractor,
        projection.part("gcn_kwargs", {}) as graph,
    ):
        channels, strides = projection.take("out_channels"), projection.take("pyramid_levels")
        for part, name, *accepted in (
            (projection, "type", "VSGNPyramidProj"),
            (neck, "type", "VSGNFPN"),
            (rpn, "type", "VSGNRPNHead"),
            (roi, "type", "VSGNRoIHead"),
            (neck, "out_channels", channels),
            *((part, "in_channels", channels) for part in (neck, rpn, roi, evaluation)),
            (neck, "num_levels", len(strides)),
            (anchors, "pyramid_levels", strides),
            (extractor, "base_stride", strides[0]),
            (extractor, "tscale", anchors.take("tscale")),
            (extractor, "type", "CornerExtractor"),
            (extractor, "beta", 8.0),
            (evaluation, "type", "TemporalEvaluationHead"),
            (evaluation, "num_classes", 3),
            (evaluation, "loss", {"pos_thresh": 0.5, "gt_type": ["startness", "endness", "actionness"]}),
            (focal, "type", "FocalLoss", "BalancedCELoss"),
            (focal, "gamma", 2.0),
            (rpn, "loss_loc", None),
            (roi, "loss_loc", None),
            (graph, "nfeat_mode", "feat_ctr"),
            (graph, "agg_type", "max"),
            (graph, "edge_weight", "false"),
        ):
            part.only(name, *accepted)
        projection.drop("in_channels")
        rpn.drop("num_classes")
        neighbours = graph.take("num_neigh", 10)
        return VSGNConfig(
            channels=channels,
            num_levels=len(strides),
            first_stride=strides[0],
            num_neighbours=neighbours if projection.take("use_gcn", False) else None,
            num_head_convs=rpn.take("num_layers"),
            anchor_scales=anchors.take("anchor_scale"),
            anchor_iou=rpn.take("iou_thr"),
            boundary_iou=roi.take("iou_thr"),
            focal_alpha=focal.take("alpha", VSGNConfig.focal_alpha),
        )


def features(case: Case, dtype: torch.dtype = torch.float32) -> Features:
    return Features(case.tensor("feats").to(dtype), case.tensor("masks"))


@opentad_cases
@both_precisions
def test_predictions(name: str, dtype: torch.dtype) -> None:
    case = load(name)
    localizer = build(case).to(dtype).eval()
    with torch.no_grad():
        outputs = localizer(features(case, dtype))
        encoded = localizer.encoder(*features(case, dtype))
        decoded = localizer.decoder(encoded)
    suffix = "" if dtype == torch.float32 else "_f64"
    compared = {
        "cls_logits": outputs.logits,
        "tem_logits": outputs.evaluation,
        "roi_proposals": outputs.adjusted,
    }
    if dtype == torch.float32:
        last = localizer.config.num_levels - 1
        compared |= {"rpn_proposals": outputs.proposals, "anchors": outputs.anchors}
        compared |= {f"proj_level{level}": encoded.levels[level] for level in (0, last)}
        compared |= {f"neck_level{level}": decoded.levels[level] for level in (0, last)}
    for key, ours in compared.items():
        reference = case.arrays[key + suffix]
        assert ours.shape == reference.shape, key
        assert largest_error(ours, reference.astype(np.float64)) <= OUTPUT_TOLERANCE[dtype], key


@opentad_cases
def test_losses_and_gradients_of_a_training_step(name: str) -> None:
    case = load(name)
    localizer = build(case).train()
    truth = batch_actions(case)
    losses = localizer.loss(localizer(features(case)), truth, [STEPS] * len(truth))
    for theirs, value in zip(case.arrays["loss_names"].tolist(), case.arrays["loss_train"].tolist(), strict=True):
        assert losses[LOSS_NAMES[theirs]].item() == pytest.approx(value, rel=LOSS_TOLERANCE), theirs
    counts = [localizer.positives[loss].value().item() for loss in ("regression", "classification", "adjustment")]
    np.testing.assert_allclose(counts, case.arrays["loss_normalizers_after"], rtol=1e-6)

    losses["total"].backward()
    gradients = {
        public_name(key, localizer=localizer, layout="opentad"): parameter.grad
        for key, parameter in localizer.named_parameters()
    }
    ordered = [gradients[theirs] for theirs in case.arrays["param_names"].tolist()]
    check_gradients(case, case.tensor("feats"), ordered, GRADIENT_TOLERANCES)


@opentad_cases
def test_candidates_and_results(name: str) -> None:
    case, results = load(name), read_json(f"{name}_results.json")
    localizer = build(case).eval()
    with torch.no_grad():
        outputs = localizer(features(case))
    # OpenTAD decodes the padding as well.
    outputs = outputs._replace(mask=torch.ones_like(outputs.mask))
    classes = [f"class_{index:02d}" for index in range(len(localizer.classes))]
    for clip, candidates in enumerate(localizer.candidates(outputs)):
        check_same(Detections(*candidates), stored(case.arrays, "pre_nms", clip), score=1e-5)
        ours = suppress(Detections(*candidates), suppression(case.config["nms"]))
        check_same(ours, stored(case.arrays, "nms", clip), unsure=2)
        meta = results["metas"][clip]
        reference = results["results"][meta["video_name"]]
        names = sorted({entry["label"] for entry in reference}) if len(classes) == 1 else classes
        seconds = timeline(meta).to_seconds(ours.segments)
        ours = rounded(Detections(seconds, ours.scores, ours.labels))
        check_same(ours, from_results(reference, names), score=2e-4, segment=0.0101)


@opentad_cases
def test_weights_go_back_to_where_they_came_from(name: str) -> None:
    case = load(name)
    exported = export_weights(build(case), layout="opentad")
    assert exported.keys() == case.state.keys()
    assert all(torch.equal(tensor, case.state[key]) for key, tensor in exported.items())


@pytest.mark.parametrize("name", cases("vsgn_coolbay"))
def test_anchors_of_the_original_are_the_same(name: str) -> None:
    case = load(name)
    options = case.config["opt"]
    strides = [options["base_stride"] * 2**level for level in range(options["num_levels"])]
    anchors = pyramid_anchors(options["temporal_scale"], strides, options["anchor_scale"])
    assert np.array_equal(anchors, case.arrays["anchors"])


@pytest.fixture(scope="module", params=cases("vsgn_coolbay"))
def original(request) -> tuple[Case, VSGN]:
    case = load(request.param)
    if not case.state:
        pytest.skip("the weights of the original are not among these vectors")
    options = case.config["opt"]
    num_classes = 1 if options["dataset"] == "activitynet" else options["decoder_num_classes"] - 1
    localizer = build_localizer(
        original_config(options),
        in_channels=options["input_feat_dim"],
        classes=[str(index) for index in range(num_classes)],
    )
    assert isinstance(localizer, VSGN)
    localizer.load_state_dict(import_weights(case.state, localizer=localizer, layout="original"))
    assert export_weights(localizer, layout="original").keys() == case.state.keys()
    return case, localizer


def original_config(given: dict[str, Any]) -> VSGNConfig:
    with Arguments("opt", given) as options:
        options.drop("batch_size", "is_train", "dataset", "input_feat_dim", "temporal_scale", "decoder_num_classes")
        options.drop("short_ratio", "stitch_gap")
        options.only("use_VSS", False)
        options.only("nfeat_mode", "feat_ctr")
        options.only("agg_type", "max")
        options.only("edge_weight", "false")
        options.only("gcn_insert", "par")
        neighbours = options.take("num_neigh")
        anchor_iou, class_iou, boundary_iou = options.take("iou_thr")
        assert anchor_iou == class_iou, "ours has one threshold for segments and classes"
        return VSGNConfig(
            variant="original",
            channels=options.take("bb_hidden_dim"),
            num_levels=options.take("num_levels"),
            first_stride=options.take("base_stride"),
            num_neighbours=neighbours if options.take("use_xGPN", True) else None,
            num_head_convs=options.take("num_head_layers"),
            anchor_scales=options.take("anchor_scale"),
            anchor_iou=anchor_iou,
            boundary_iou=boundary_iou,
            focal_alpha=options.take("focal_alpha"),
        )


@both_precisions
def test_predictions_of_the_original(original: tuple[Case, VSGN], dtype: torch.dtype) -> None:
    case, localizer = original
    localizer = deepcopy(localizer).to(dtype).eval()
    values = case.tensor("feats").to(dtype)
    whole = torch.ones(values.shape[0], values.shape[2], dtype=torch.bool)
    with torch.no_grad():
        outputs = localizer(Features(values, whole))
        encoded = localizer.encoder(values, whole)
        decoded = localizer.decoder(encoded)
    starts, ends, inside = outputs.evaluation.sigmoid().unbind(dim=1)
    compared = {
        "loc_dec": outputs.proposals,
        "score_dec": outputs.logits.sigmoid() if len(localizer.classes) == 1 else outputs.logits.softmax(dim=-1),
        "loc_adjusted": outputs.adjusted,
        "startness": starts,
        "endness": ends,
        "actionness": inside,
    }
    suffix = "_f64" if dtype == torch.float64 else ""
    if dtype == torch.float32:
        compared |= {"feats_enc_0": encoded.levels[0], "feats_enc_last": encoded.levels[-1]}
        compared |= {"feats_dec_last": decoded.levels[0]}
    for key, ours in compared.items():
        reference = case.arrays[key + suffix].astype(np.float64)
        assert ours.shape == reference.shape, key
        # Scores go through a logit here, which keeps seven digits near 0 and 1.
        least = 2e-7 if key.endswith("ness") else 0.0
        assert largest_error(ours, reference) <= max(OUTPUT_TOLERANCE[dtype], least), key


def test_losses_and_gradients_of_the_original(original: tuple[Case, VSGN]) -> None:
    case, localizer = original
    localizer = deepcopy(localizer).train()
    values, counts = case.tensor("feats"), case.arrays["num_gt"]
    num_steps = values.shape[2]
    truth = [
        [
            Action(float(start) * num_steps, float(end) * num_steps, str(int(label) - 1))
            for start, end, label in case.arrays["gt_bbox"][clip][: counts[clip]]
        ]
        for clip in range(len(values))
    ]
    mask = torch.ones(len(values), num_steps, dtype=torch.bool)
    outputs = localizer(Features(values, mask))
    losses = localizer.loss(outputs, truth, [STEPS] * len(truth))
    theirs = dict(zip(case.arrays["loss_names"].tolist(), case.arrays["loss_train"].tolist(), strict=True))
    for ours, name in (
        ("classification", "loss_cls_dec"),
        ("regression", "loss_reg_dec"),
        ("adjustment", "loss_bd_adjust"),
    ):
        assert losses[ours].item() == pytest.approx(theirs[name], rel=LOSS_TOLERANCE), name
    total = losses["classification"] + losses["regression"] + losses["adjustment"]
    for kind, name in enumerate(("start", "end", "action")):
        found = balanced_bce(outputs.evaluation[:, kind], case.tensor(f"gt_{name}") > 0.5, epsilon=1e-5)
        assert found.item() == pytest.approx(theirs[f"loss_{name}"], rel=LOSS_TOLERANCE), name
        total = total + found
    total.backward()
    gradients = {
        public_name(key, localizer=localizer, layout="original"): parameter.grad
        for key, parameter in localizer.named_parameters()
    }
    ordered = [gradients[key] for key in case.arrays["param_names"].tolist()]
    check_gradients(case, values, ordered, GRADIENT_TOLERANCES)
