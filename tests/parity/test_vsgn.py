"""VSGN against OpenTAD's, with and without the graph: features, predictions, losses, gradients, candidates, results."""

from __future__ import annotations

from copy import deepcopy

import numpy as np
import pytest
import torch
from parity.actionformers import STEPS, batch_actions, suppression
from parity.compare import Tolerances, check_gradients, largest_error
from parity.detections import check_same, from_results, rounded, stored
from parity.vectors import Case, cases, load, read_json

from re2tal.evaluation.suppression import suppress
from re2tal.localizers import VSGNConfig, build_localizer
from re2tal.localizers.vsgn.anchors import balanced_bce, pyramid_anchors
from re2tal.localizers.vsgn.localizer import VSGN
from re2tal.localizers.weights import export_weights, import_weights, public_name
from re2tal.structures import Action, Detections, Features, Timeline

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
    projection, rpn, roi = detector["projection"], detector["rpn_head"], detector["roi_head"]
    strides = projection["pyramid_levels"]
    config = VSGNConfig(
        channels=projection["out_channels"],
        num_levels=len(strides),
        first_stride=strides[0],
        num_neighbours=projection["gcn_kwargs"]["num_neigh"] if projection.get("use_gcn") else None,
        num_head_convs=rpn["num_layers"],
        anchor_scales=tuple(rpn["anchor_generator"]["anchor_scale"]),
        anchor_iou=rpn["iou_thr"],
        boundary_iou=roi["iou_thr"],
        focal_alpha=rpn["loss_cls"].get("alpha", VSGNConfig.focal_alpha),
    )
    # The peer counts the background among the classes, unless there is a single one.
    num_classes = max(1, rpn["num_classes"] - 1)
    localizer = build_localizer(
        config, in_channels=projection["in_channels"], classes=[str(index) for index in range(num_classes)]
    )
    assert isinstance(localizer, VSGN)
    localizer.load_state_dict(import_weights(case.state, localizer=localizer, layout="opentad"))
    return localizer


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
        check_same(ours, stored(case.arrays, "nms", clip))
        meta = results["metas"][clip]
        reference = results["results"][meta["video_name"]]
        names = sorted({entry["label"] for entry in reference}) if len(classes) == 1 else classes
        seconds = timeline(meta).to_seconds(ours.segments)
        ours = rounded(Detections(seconds, ours.scores, ours.labels))
        check_same(ours, from_results(reference, names), score=2e-4, segment=0.0101)


def timeline(meta: dict) -> Timeline:
    if "resize_length" in meta:
        return Timeline(0.0, meta["duration"] / meta["resize_length"], meta["duration"])
    return Timeline(meta["offset_frames"] / meta["fps"], meta["snippet_stride"] / meta["fps"], meta["duration"])


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
    config = VSGNConfig(
        variant="original",
        channels=options["bb_hidden_dim"],
        num_levels=options["num_levels"],
        first_stride=options["base_stride"],
        num_neighbours=options["num_neigh"] if options.get("use_xGPN", True) else None,
        num_head_convs=options["num_head_layers"],
        anchor_scales=tuple(options["anchor_scale"]),
        anchor_iou=options["iou_thr"][0],
        boundary_iou=options["iou_thr"][2],
    )
    classes = [str(index) for index in range(options["decoder_num_classes"] - 1)]
    localizer = build_localizer(config, in_channels=options["input_feat_dim"], classes=classes)
    assert isinstance(localizer, VSGN)
    localizer.load_state_dict(import_weights(case.state, localizer=localizer, layout="original"))
    assert export_weights(localizer, layout="original").keys() == case.state.keys()
    return case, localizer


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
        "score_dec": outputs.logits.softmax(dim=-1),
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


def test_losses_of_the_original(original: tuple[Case, VSGN]) -> None:
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
    for kind, name in enumerate(("start", "end", "action")):
        found = balanced_bce(outputs.evaluation[:, kind], case.tensor(f"gt_{name}") > 0.5, epsilon=1e-5)
        assert found.item() == pytest.approx(theirs[f"loss_{name}"], rel=LOSS_TOLERANCE), name
