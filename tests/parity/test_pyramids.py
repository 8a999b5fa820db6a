"""TemporalMaxer and TriDet against OpenTAD's: levels, predictions, targets, losses, gradients, candidates, results."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from parity.compare import Tolerances, check_gradients
from parity.detections import check_same, from_results, rounded, stored
from parity.pyramids import STEPS, batch_actions, build, timeline
from parity.suppressions import suppression
from parity.vectors import Case, cases, load, read_json
from torch import Tensor

from re2tal.evaluation.suppression import suppress
from re2tal.localizers.pyramid.localizer import PyramidLocalizer
from re2tal.localizers.pyramid.points import PyramidOutputs
from re2tal.localizers.pyramid.tridet import TridentHead
from re2tal.localizers.weights import export_weights, public_name
from re2tal.structures import Detections, Features

OUTPUT_TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-6}
LOSS_TOLERANCE = 1e-5
TOLERANCES = Tolerances(
    output=OUTPUT_TOLERANCE,
    grad_x={torch.float32: 1e-4},
    loss={},
    norm={torch.float32: 0.0, torch.float64: 0.0},
    norm_floor={torch.float32: 1e-4, torch.float64: 1e-5},
    probe={torch.float32: 1e-4, torch.float64: 1e-5},
)
NAMES = cases("temporalmaxer_") + cases("tridet_")
every_case = pytest.mark.parametrize("name", NAMES)
both_precisions = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


def batch(case: Case, dtype: torch.dtype) -> Features:
    return Features(case.tensor("feats").to(dtype).requires_grad_(), case.tensor("masks"))


def outputs_of(localizer: PyramidLocalizer, features: Features) -> dict[str, tuple[Tensor, Tensor]]:
    """Each output under the name that its reference array has, (B, P, ...), and which of its points are real."""
    pyramid = localizer.encoder(*features)
    named = {f"proj_level{level}": (x.transpose(1, 2), m) for level, (x, m) in enumerate(zip(*pyramid, strict=True))}
    normed = pyramid._replace(
        levels=tuple(norm(x) for norm, x in zip(localizer.level_norms, pyramid.levels, strict=True))
    )
    named |= {f"neck_level{level}": (x.transpose(1, 2), m) for level, (x, m) in enumerate(zip(*normed, strict=True))}
    mask = torch.cat(pyramid.masks, dim=1)
    named["cls_logits"] = (localizer.classifier(normed), mask)
    head, offsets = localizer.regressor, localizer.regressor(normed)
    if isinstance(head, TridentHead):
        apart = normed._replace(levels=tuple(level.detach() for level in normed.levels))
        named["reg_bins"] = (torch.cat(head.levels(normed), dim=2).transpose(1, 2), mask)
        named["start_logits"], named["end_logits"] = (head.starts(apart), mask), (head.ends(apart), mask)
        named["decoded_offsets"] = (offsets, mask)
    else:
        named["reg_offsets"] = (offsets, mask)
    return named


def reference_of(case: Case, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
    array = case.tensor(name if dtype == torch.float32 else f"{name}_f64")
    return array.transpose(1, 2) if "_level" in name or name == "decoded_offsets" else array


def check_close(ours: Tensor, reference: Tensor, mask: Tensor, dtype: torch.dtype, what: str) -> None:
    assert ours.shape == reference.shape, what
    off = (ours.detach().double() - reference.double())[mask].abs().max() / reference.double()[mask].abs().max()
    assert off <= OUTPUT_TOLERANCE[dtype], f"{what}: off by {off:.1e} of the largest value"


@every_case
@both_precisions
def test_levels_and_predictions_at_real_points(name: str, dtype: torch.dtype) -> None:
    case = load(name)
    localizer = build(case).to(dtype)
    features = batch(case, dtype)
    outputs = localizer(features)
    assert torch.equal(outputs.mask, case.tensor("point_masks"))
    assert torch.equal(outputs.points, case.tensor("points"))
    compared = 0
    for what, (ours, mask) in outputs_of(localizer, features).items():
        if (what if dtype == torch.float32 else f"{what}_f64") in case.arrays:
            check_close(ours, reference_of(case, what, dtype), mask, dtype, what)
            compared += 1
    assert compared >= 2


def stored_outputs(case: Case) -> PyramidOutputs:
    """OpenTAD's own predictions, so that what follows them is compared exactly."""
    logits = case.tensor("cls_logits")
    offsets = reference_of(case, "reg_offsets" if "reg_offsets" in case.arrays else "decoded_offsets")
    return PyramidOutputs(logits, offsets, case.tensor("points"), case.tensor("point_masks"), torch.empty(0))


@every_case
def test_targets_exactly(name: str) -> None:
    case = load(name)
    localizer, outputs = build(case), stored_outputs(case)
    for clip in case.clips("gt_segments_"):
        classes, offsets, weights = localizer.assign(
            outputs.points,
            case.tensor(f"gt_segments_{clip}"),
            case.tensor(f"gt_labels_{clip}"),
            logits=outputs.logits[clip],
            offsets=outputs.offsets[clip],
            mask=outputs.mask[clip],
        )
        reference = case.tensor("target_cls")[clip]
        assert torch.equal(classes, reference)
        positive = reference.any(dim=1) & outputs.mask[clip]
        assert positive.any()
        expected = case.tensor("target_reg")[clip]
        torch.testing.assert_close(offsets[positive], expected[positive], rtol=1e-6, atol=1e-6)
        if "target_weight" in case.arrays:
            real = outputs.mask[clip]
            assert torch.equal(weights[real], case.tensor("target_weight")[clip][real])


def check_losses(losses: dict[str, Tensor], reference: np.ndarray) -> None:
    ours = [losses[key].item() for key in ("classification", "regression", "total")]
    np.testing.assert_allclose(ours, reference[:3], rtol=LOSS_TOLERANCE)


def check_parameter_gradients(case: Case, localizer: PyramidLocalizer, features: Features, prefix: str) -> None:
    kinds = ("param_grad_norm", "param_grad_norm_f64", "param_grad_probe_f64")
    arrays = {kind: case.arrays[prefix + kind] for kind in kinds}
    # The probe is of the float64 run; the float32 one is as close as its rounding.
    arrays |= {"param_names": case.arrays["param_names"], "param_grad_probe": arrays["param_grad_probe_f64"]}
    gradients = {
        public_name(key, localizer=localizer, layout="opentad"): parameter.grad
        for key, parameter in localizer.named_parameters()
    }
    names = set(case.arrays["param_names"].tolist())
    # A case with `path_pdrop` 0 has no scales of branches.
    assert {key for key in gradients if key in names or ".drop_path_" not in key} == names
    arrays["grad_x"] = case.arrays[f"{prefix}grad_feats"]
    ordered = [gradients[key] for key in case.arrays["param_names"].tolist()]
    check_gradients(replace(case, arrays=arrays), features.values, ordered, TOLERANCES)


@every_case
@both_precisions
def test_losses_and_gradients_of_a_training_step(name: str, dtype: torch.dtype) -> None:
    case = load(name)
    localizer = build(case).to(dtype).train()
    features = batch(case, dtype)
    truth = batch_actions(case)
    losses = localizer.loss(localizer(features), truth, [STEPS] * len(truth))
    reference = case.arrays["loss_train" if dtype == torch.float32 else "loss_train_f64"]
    check_losses(losses, reference)
    assert localizer.positives.value().item() == pytest.approx(reference[3], rel=LOSS_TOLERANCE)
    losses["total"].backward()
    check_parameter_gradients(case, localizer, features, "")


@every_case
def test_losses_in_evaluation_and_of_a_clip_without_actions(name: str) -> None:
    case = load(name)
    localizer = build(case)
    outputs = localizer(batch(case, torch.float32))
    truth = batch_actions(case)
    check_losses(localizer.eval().loss(outputs, truth, [STEPS] * len(truth)), case.arrays["loss_eval"])
    before = case.arrays["loss_normalizer_initial"]
    assert localizer.positives.value().item() == pytest.approx(before, rel=LOSS_TOLERANCE), "updated in evaluation"
    losses = localizer.train().loss(outputs, [*truth[:-1], []], [STEPS] * len(truth))
    assert losses["total"].isfinite()
    if "loss_train_empty" in case.arrays:  # TemporalMaxer's peer stops at such a clip
        check_losses(losses, case.arrays["loss_train_empty"])


@every_case
@both_precisions
def test_gradients_of_a_linear_function_of_all_outputs(name: str, dtype: torch.dtype) -> None:
    case = load(name)
    localizer = build(case).to(dtype).train()
    features = batch(case, dtype)
    total, used = torch.zeros((), dtype=dtype), 0
    for what, (ours, _) in outputs_of(localizer, features).items():
        if f"w_{what}" in case.arrays:
            total = total + (ours * reference_of(case, f"w_{what}").to(dtype)).sum() / ours.numel() ** 0.5
            used += 1
    assert used == sum(key.startswith("w_") for key in case.arrays)
    reference = case.arrays["lin_loss" if dtype == torch.float32 else "lin_loss_f64"]
    assert total.item() == pytest.approx(float(reference), rel=1e-4)
    total.backward()
    check_parameter_gradients(case, localizer, features, "lin_")


def videos() -> list[tuple[str, int]]:
    return [(name, clip) for name in NAMES for clip in range(len(load(name).config["test_lengths"]))]


@pytest.mark.parametrize(("name", "clip"), videos())
def test_a_video_from_features_to_results(name: str, clip: int) -> None:
    case = load(name)
    localizer = build(case).eval()
    with torch.no_grad():
        outputs = localizer(Features(case.tensor(f"test_feats_{clip}")[None], case.tensor(f"test_masks_{clip}")[None]))
    assert torch.equal(outputs.mask[0], case.tensor(f"test_point_masks_{clip}"))
    reference = case.tensor(f"test_cls_logits_{clip}")
    check_close(outputs.logits[0], reference, outputs.mask[0], torch.float32, "test_cls_logits")

    candidates = Detections(*localizer.candidates(outputs)[0])
    expected = stored(case.arrays, "pre_nms", clip)
    if expected.scores.numel() and reference.shape[1] == 1:
        # With one class the peer keeps the points that are not real, at a score of 0.
        kept = expected.scores > 0
        expected = Detections(expected.segments[kept], expected.scores[kept], expected.labels[kept])
    check_same(candidates, expected)
    config = suppression(case.config["nms"])
    check_same(suppress(candidates, config), stored(case.arrays, "nms", clip), unsure=2)
    check_same(suppress(expected, config), stored(case.arrays, "nms", clip), score=1e-5, segment=1e-4)

    (results,) = read_json(f"{name}_results.json").values()
    meta = results["metas"][clip]
    seconds = timeline(meta).to_seconds(case.tensor(f"nms_segments_{clip}"))
    torch.testing.assert_close(seconds, case.tensor(f"seconds_segments_{clip}"), rtol=0, atol=1e-4)
    ours = suppress(expected, config)
    ours = replace(ours, segments=timeline(meta).to_seconds(ours.segments))
    num_classes = len(localizer.classes)
    classes = ["action"] if num_classes == 1 else [f"class_{index:02d}" for index in range(num_classes)]
    # A value in the middle between two decimals may be rounded either way.
    found = from_results(results["results"][meta["video_name"]], classes)
    check_same(rounded(ours), found, score=1.01e-4, segment=0.0101)


@every_case
def test_export_is_the_inverse_of_import(name: str) -> None:
    case = load(name)
    exported = export_weights(build(case), layout="opentad")
    assert exported.keys() == case.state.keys()
    for key, tensor in exported.items():
        torch.testing.assert_close(tensor, case.state[key], rtol=1e-6, atol=0, check_dtype=False)


@every_case
@pytest.mark.parametrize(
    ("part", "name_of", "value"),
    [
        ("projection", "frobnicate", 3),
        ("projection", "norm_cfg", {"type": "BN"}),
        ("neck", "type", "FPN"),
        ("rpn_head", "loss_weight", -1.0),
        ("rpn_head", "centre", "inside"),
    ],
)
def test_what_no_option_says_is_refused_by_name(name: str, part: str, name_of: str, value: object) -> None:
    case = load(name)
    detector = case.config["detector"]
    changed = detector | {part: detector[part] | {name_of: value}}
    with pytest.raises(ValueError, match=name_of):
        build(replace(case, config=case.config | {"detector": changed}))
