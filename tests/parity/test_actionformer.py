"""ActionFormer against both public implementations: predictions, targets, losses, gradients, candidates, seconds.

Cases of whole detectors are fed their stored backbone features; test_detector.py runs them from the frames.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from parity.compare import Tolerances, check_gradients
from parity.detections import check_same, from_results, rounded, stored
from parity.pyramids import STEPS, actions, build, timeline
from parity.suppressions import original_suppression, suppression
from parity.vectors import Case, cases, load, read_json

from re2tal.evaluation.suppression import suppress
from re2tal.evaluation.video_classes import fuse_video_classes
from re2tal.localizers.pyramid.localizer import PyramidLocalizer
from re2tal.localizers.pyramid.points import PyramidOutputs, pyramid_points
from re2tal.localizers.weights import export_weights, public_name
from re2tal.structures import Action, Detections, Features, Timeline

OUTPUT_TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-6}
LOSS_TOLERANCE = 1e-5
TOLERANCES = Tolerances(
    output=OUTPUT_TOLERANCE,
    grad_x={},
    loss={},
    norm={torch.float32: 0.0, torch.float64: 0.0},
    norm_floor={torch.float32: 1e-4, torch.float64: 1e-5},
    probe={torch.float32: 1e-4, torch.float64: 1e-5},
)
both_layouts = pytest.mark.parametrize(
    ("name", "layout"),
    [(name, "opentad") for name in cases("det_")] + [(name, "original") for name in cases("actionformer_")],
)
opentad_cases = pytest.mark.parametrize("name", cases("det_"))
original_cases = pytest.mark.parametrize("name", cases("actionformer_"))
both_precisions = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


def training_batch(case: Case, layout: str, dtype: torch.dtype) -> Features:
    if layout == "opentad":
        return Features(case.tensor("feat_backbone").to(dtype), case.tensor("masks"))
    clips = [case.tensor(f"feats_{clip}").to(dtype) for clip in range(len(case.arrays["train_mask"]))]
    longest = max(clip.shape[1] for clip in clips)
    padded = [torch.nn.functional.pad(clip, (0, longest - clip.shape[1])) for clip in clips]
    lengths = torch.tensor([[clip.shape[1]] for clip in clips])
    return Features(torch.stack(padded), torch.arange(longest) < lengths)


def ground_truth(case: Case, clip: int) -> tuple[torch.Tensor, torch.Tensor]:
    prefix = "gt_" if f"gt_segments_{clip}" in case.arrays else ""
    return case.tensor(f"{prefix}segments_{clip}"), case.tensor(f"{prefix}labels_{clip}")


def batch_actions(case: Case) -> list[list[Action]]:
    return [actions(*ground_truth(case, clip)) for clip in range(len(case.arrays["target_cls"]))]


def check_outputs(ours: torch.Tensor, reference: np.ndarray, mask: torch.Tensor, dtype: torch.dtype) -> None:
    assert ours.shape == reference.shape
    off = (ours.detach().double() - torch.from_numpy(reference).double())[mask].abs().max()
    assert off <= OUTPUT_TOLERANCE[dtype] * np.abs(reference).max()


def stored_outputs(case: Case) -> PyramidOutputs:
    """OpenTAD's own predictions, so that what follows them is compared exactly."""
    stored = (case.tensor(key) for key in ("cls_logits", "reg_offsets", "points", "point_masks"))
    return PyramidOutputs(*stored, step_logits=torch.empty(0))


@opentad_cases
@both_precisions
def test_predictions_from_opentads_features(name: str, dtype: torch.dtype) -> None:
    case = load(name)
    outputs = build(case, layout="opentad").to(dtype).eval()(training_batch(case, "opentad", dtype))
    assert torch.equal(outputs.mask, case.tensor("point_masks"))
    assert torch.equal(outputs.points, case.tensor("points"))
    suffix = "" if dtype == torch.float32 else "_f64"
    check_outputs(outputs.logits, case.arrays[f"cls_logits{suffix}"], outputs.mask, dtype)
    check_outputs(outputs.offsets, case.arrays[f"reg_offsets{suffix}"], outputs.mask, dtype)


@original_cases
@both_precisions
def test_predictions_of_the_original_on_a_padded_batch(name: str, dtype: torch.dtype) -> None:
    case = load(name)
    outputs = build(case, layout="original").to(dtype)(training_batch(case, "original", dtype))
    assert torch.equal(outputs.mask, case.tensor("train_mask"))
    suffix = "" if dtype == torch.float32 else "_f64"
    check_outputs(outputs.logits, case.arrays[f"train_cls_logits{suffix}"], outputs.mask, dtype)
    if dtype == torch.float32:
        check_outputs(outputs.offsets, case.arrays["train_offsets"], outputs.mask, dtype)


@pytest.mark.parametrize(
    ("name", "clip"), [(name, clip) for name in cases("actionformer_") for clip in load(name).clips("feats_")]
)
def test_detections_of_the_original_on_clips_of_any_length(name: str, clip: int) -> None:
    case = load(name)
    localizer = build(case, layout="original").eval()
    values = case.tensor(f"feats_{clip}")[None]
    with torch.no_grad():
        outputs = localizer(Features(values, torch.ones(1, values.shape[-1], dtype=torch.bool)))
    assert torch.equal(outputs.mask[0], case.tensor(f"eval_mask_{clip}"))
    check_outputs(outputs.logits[0], case.arrays[f"eval_cls_logits_{clip}"], outputs.mask[0], torch.float32)
    check_outputs(outputs.offsets[0], case.arrays[f"eval_offsets_{clip}"], outputs.mask[0], torch.float32)
    points = case.arrays.get(f"eval_points_{clip}", outputs.points.numpy())
    assert np.array_equal(outputs.points, points)

    reference_outputs = PyramidOutputs(
        case.tensor(f"eval_cls_logits_{clip}")[None],
        case.tensor(f"eval_offsets_{clip}")[None],
        outputs.points,
        outputs.mask,
        outputs.step_logits,
    )
    candidates = Detections(*localizer.candidates(reference_outputs)[0])
    check_same(candidates, stored(case.arrays, "pre_nms", clip), score=1e-6, segment=1e-4)

    ours = suppress(Detections(*localizer.candidates(outputs)[0]), original_suppression(case.config))
    check_same(ours, stored(case.arrays, "nms", clip), unsure=2)
    config = case.config
    timeline = Timeline(
        start_seconds=0.5 * config["feat_num_frames"] / config["fps"],
        seconds_per_step=config["feat_stride"] / config["fps"],
        duration_seconds=config["durations"][clip],
    )
    seconds = timeline.to_seconds(case.tensor(f"nms_segments_{clip}"))
    torch.testing.assert_close(seconds, case.tensor(f"final_segments_{clip}"), rtol=0, atol=1e-4)


@both_layouts
def test_targets_exactly(name: str, layout: str) -> None:
    case = load(name)
    localizer = build(case, layout=layout)
    points = pyramid_points(localizer.config.max_num_steps, localizer.config.regression_ranges)
    for clip in range(len(case.arrays["target_cls"])):
        classes, offsets, _ = localizer.assign(
            points,
            *ground_truth(case, clip),
            logits=torch.zeros(case.arrays["target_cls"].shape[1:]),
            offsets=torch.zeros(len(points), 2),
            mask=torch.ones(len(points), dtype=torch.bool),
        )
        assert np.array_equal(classes, case.arrays["target_cls"][clip])
        positive = classes.any(dim=1)
        reference = case.tensor("target_reg")[clip]
        torch.testing.assert_close(offsets[positive], reference[positive], rtol=1e-6, atol=1e-6)


def check_losses(case: Case, localizer: PyramidLocalizer, losses: dict, reference: np.ndarray, layout: str) -> None:
    """`reference` holds classification, regression, total and the divisor after the call."""
    weight = localizer.config.regression_weight if layout == "original" else 1.0
    ours = [losses["classification"].item(), losses["regression"].item() / weight, losses["total"].item()]
    np.testing.assert_allclose(ours, reference[:3], rtol=LOSS_TOLERANCE)


@both_layouts
@both_precisions
def test_losses_and_gradients_of_a_training_step(name: str, layout: str, dtype: torch.dtype) -> None:
    case = load(name)
    localizer = build(case, layout=layout).to(dtype).train()
    features = training_batch(case, layout, dtype)
    truth = batch_actions(case)
    losses = localizer.loss(localizer(features), truth, [STEPS] * len(truth))
    reference = case.arrays["loss_train" if dtype == torch.float32 else "loss_train_f64"]
    check_losses(case, localizer, losses, reference, layout)
    assert localizer.positives.value().item() == pytest.approx(reference[3], rel=LOSS_TOLERANCE)

    losses["total"].backward()
    gradients = {
        public_name(key, localizer=localizer, layout=layout): parameter.grad
        for key, parameter in localizer.named_parameters()
    }
    ours = np.isin(case.arrays["param_names"], list(gradients))
    assert ours.sum() == len(gradients)
    per_parameter = {key: value[ours] for key, value in case.arrays.items() if key.startswith("param_")}
    per_parameter.setdefault("param_grad_probe", per_parameter["param_grad_probe_f64"])
    part = replace(case, arrays=per_parameter)
    ordered = [gradients[key] for key in part.arrays["param_names"].tolist()]
    check_gradients(part, features.values, ordered, TOLERANCES)


@opentad_cases
def test_losses_in_evaluation_and_of_a_clip_without_actions(name: str) -> None:
    case = load(name)
    localizer = build(case, layout="opentad")
    outputs = localizer(training_batch(case, "opentad", torch.float32))
    truth = batch_actions(case)
    losses = localizer.eval().loss(outputs, truth, [STEPS] * len(truth))
    check_losses(case, localizer, losses, case.arrays["loss_eval"], "opentad")
    before = case.arrays["loss_normalizer_initial"]
    assert localizer.positives.value().item() == pytest.approx(before, rel=LOSS_TOLERANCE), "updated in evaluation"

    reference = case.arrays["loss_train_empty"]
    losses = localizer.train().loss(outputs, [*truth[:-1], []], [STEPS] * len(truth))
    check_losses(case, localizer, losses, reference, "opentad")
    assert localizer.positives.value().item() == pytest.approx(reference[3], rel=LOSS_TOLERANCE)


@both_layouts
def test_weights_go_back_to_where_they_came_from(name: str, layout: str) -> None:
    case = load(name)
    exported = export_weights(build(case, layout=layout), layout=layout)
    video = {key for key in case.state if layout == "opentad" and key.startswith("backbone.")}
    assert exported.keys() == case.state.keys() - video
    for key, tensor in exported.items():
        torch.testing.assert_close(tensor, case.state[key], rtol=1e-6, atol=0)


@opentad_cases
def test_candidates_and_seconds_of_opentad(name: str) -> None:
    case = load(name)
    localizer = build(case, layout="opentad")
    metas = next(iter(read_json(f"{name}_results.json").values()))["metas"]
    for clip, candidates in enumerate(localizer.candidates(stored_outputs(case))):
        check_same(Detections(*candidates), stored(case.arrays, "pre_nms", clip), score=1e-6, segment=1e-4)
        seconds = timeline(metas[clip]).to_seconds(case.tensor(f"nms_segments_{clip}"))
        torch.testing.assert_close(seconds, case.tensor(f"seconds_segments_{clip}"), rtol=0, atol=1e-4)


def whole_video_results() -> list[tuple[str, str]]:
    return [
        (name, entry)
        for name in cases("det_")
        for entry in read_json(f"{name}_results.json")
        if entry not in ("sliding_window", "nms_config")
    ]


@pytest.mark.parametrize(("name", "entry"), whole_video_results())
def test_results_of_whole_videos(name: str, entry: str) -> None:
    """OpenTAD suppresses whole videos in steps and converts to seconds afterwards."""
    case, results = load(name), read_json(f"{name}_results.json")[entry]
    config = suppression(case.config["nms"])
    classifier = results.get("classifier")
    for clip, candidates in enumerate(build(case, layout="opentad").candidates(stored_outputs(case))):
        meta = results["metas"][clip]
        ours = suppress(Detections(*candidates), config)
        ours = replace(ours, segments=timeline(meta).to_seconds(ours.segments))
        reference = results["results"][meta["video_name"]]
        classes = sorted({entry["label"] for entry in reference})
        if classifier is not None:
            classes = classifier["class"]
            scores = torch.tensor(classifier["results"][meta["video_name"]], dtype=torch.float64)
            ours = fuse_video_classes(ours, scores, top_k=results["topk"])
        elif case.config["rpn_head"]["num_classes"] > 1:
            classes = [f"class_{index:02d}" for index in range(case.config["rpn_head"]["num_classes"])]
        # A value in the middle between two decimals may be rounded either way.
        check_same(rounded(ours), from_results(reference, classes), score=1.01e-4, segment=0.0101)


@pytest.mark.parametrize(
    "name", [name for name in cases("det_") if "sliding_window" in read_json(f"{name}_results.json")]
)
def test_results_of_windows_merged_into_one_video(name: str) -> None:
    """OpenTAD converts windows to seconds, rounds, merges, and suppresses last."""
    case, results = load(name), read_json(f"{name}_results.json")["sliding_window"]
    localizer = build(case, layout="opentad")
    classes = [f"class_{index:02d}" for index in range(case.config["rpn_head"]["num_classes"])]
    windows = localizer.detect(stored_outputs(case), [timeline(meta) for meta in results["metas"]])
    video = results["metas"][0]["video_name"]
    assert sum(map(len, windows)) == results["results_before_nms_count"][video]
    first = results["results_before_nms_first50"][video]
    parts = [rounded(window) for window in windows]
    merged = Detections(
        torch.cat([part.segments for part in parts]),
        torch.cat([part.scores for part in parts]),
        torch.cat([part.labels for part in parts]),
    )
    columns = (getattr(merged, part)[: len(first)] for part in ("segments", "scores", "labels"))
    check_same(Detections(*columns), from_results(first, classes), score=1.01e-4, segment=0.0101)
    ours = suppress(merged, suppression(case.config["nms"]))
    check_same(rounded(ours), from_results(results["results"][video], classes), score=1.01e-4, segment=0.0101)
