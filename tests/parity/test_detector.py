"""Whole detectors from uint8 frames against OpenTAD's Re2TAL: a rewired backbone, trained with ActionFormer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from parity.compare import Tolerances, check_gradients, largest_error
from parity.detections import check_same, stored
from parity.pyramids import STEPS, batch_actions, build
from parity.sizes import frames_per_step, slowfast_size, swin_size
from parity.suppressions import suppression
from parity.vectors import Case, cases, load
from torch import Tensor

from re2tal.backbones.base import VideoBackbone, freeze_norms
from re2tal.backbones.slowfast import layouts as slowfast_layouts
from re2tal.backbones.slowfast.network import InnerReluBottleneck, SlowFast
from re2tal.backbones.swin3d import layouts as swin3d_layouts
from re2tal.backbones.swin3d.network import VideoSwin
from re2tal.backbones.weights import KeyLayout
from re2tal.data.streaming.transforms import normalise
from re2tal.detector import TemporalActionDetector, grid_mask, resample
from re2tal.evaluation.suppression import suppress
from re2tal.localizers.weights import public_name
from re2tal.rewire import RewiringConfig, rewire
from re2tal.structures import Detections

LOSS_TOLERANCE = 1e-5
GRADIENT_TOLERANCES = Tolerances(
    output={},
    grad_x={},
    loss={},
    norm={torch.float32: 0.0, torch.float64: 0.0},
    norm_floor={torch.float32: 1e-4, torch.float64: 1e-5},
    probe={torch.float32: 1e-4, torch.float64: 1e-5},
)
VIDEO_PREFIX = "backbone.model.backbone."


@dataclass(frozen=True)
class Family:
    """How to build a case's backbone, plain; the layout of its weights; how far its outputs may be off in float32."""

    build: Callable[[Case], VideoBackbone]
    layout: KeyLayout
    output: float


def build_swin(case: Case) -> VideoSwin:
    return VideoSwin(**swin_size(case.config["backbone"]))


def build_slowfast(case: Case) -> SlowFast:
    return SlowFast(
        **slowfast_size(case.config["backbone"]), frames_per_step=frames_per_step(case), block=InnerReluBottleneck
    )


def opentad(layouts: tuple[KeyLayout, ...]) -> KeyLayout:
    return next(layout for layout in layouts if layout.name.startswith("OpenTAD"))


FAMILIES = {
    "SwinTransformer3D_inv": Family(build_swin, opentad(swin3d_layouts.KEY_LAYOUTS), output=2e-5),
    "ResNet3dSlowFast_inv": Family(build_slowfast, opentad(slowfast_layouts.KEY_LAYOUTS), output=1e-4),
}
DETECTORS = [name for name in cases("det_") if load(name).config["backbone"]["type"] in FAMILIES]

all_detectors = pytest.mark.parametrize("name", DETECTORS)
rebuilt_or_kept = pytest.mark.parametrize("recompute", [True, False], ids=["rebuilt", "kept"])
both_precisions = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


def family(case: Case) -> Family:
    return FAMILIES[case.config["backbone"]["type"]]


def video_names(case: Case) -> dict[str, str]:
    """Our name of each of the backbone's entries, by the peer's."""
    video = [key.removeprefix(VIDEO_PREFIX) for key in case.state if key.startswith(VIDEO_PREFIX)]
    return {VIDEO_PREFIX + theirs: ours for theirs, ours in family(case).layout.to_ours(video).items()}


def build_detector(case: Case, *, recompute: bool, dtype: torch.dtype) -> TemporalActionDetector:
    backbone = family(case).build(case)
    backbone.load_state_dict({ours: case.state[theirs] for theirs, ours in video_names(case).items()})
    if case.config["custom"]["norm_eval"]:
        freeze_norms(backbone)
    if case.config["custom"]["freeze_backbone"]:
        backbone.requires_grad_(False)
    rewire(backbone, config=RewiringConfig(recompute=recompute))
    localizer = build(case, layout="opentad")
    return TemporalActionDetector(backbone, localizer, num_steps=case.config["num_steps"]).to(dtype)


def inputs(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Normalised frames and a frame mask that gives the stored mask of grid steps."""
    frames = case.tensor("frames").flatten(0, 1)
    steps = torch.arange(frames.shape[2]) * case.config["num_steps"] // frames.shape[2]
    return normalise(frames).to(dtype), case.tensor("masks")[:, steps]


@all_detectors
@both_precisions
def test_features_and_predictions(name: str, dtype: torch.dtype) -> None:
    case = load(name)
    detector = build_detector(case, recompute=False, dtype=dtype).eval()
    with torch.no_grad():
        values = resample(detector.backbone(*inputs(case, dtype)).values, num_steps=detector.num_steps)
        outputs = detector(*inputs(case, dtype))
    # In float64 the peer's features are stored as float32, and predictions follow from those: 1.04e-6 was seen.
    tolerance = family(case).output if dtype == torch.float32 else 2e-6
    assert torch.equal(grid_mask(inputs(case, dtype)[1], num_steps=detector.num_steps), case.tensor("masks"))
    assert largest_error(values, case.arrays["feat_backbone"]) <= tolerance
    suffix = "" if dtype == torch.float32 else "_f64"
    for ours, key in ((outputs.logits, "cls_logits"), (outputs.offsets, "reg_offsets")):
        valid = case.tensor("point_masks")
        reference = case.tensor(key + suffix)
        off = (ours.double() - reference.double())[valid].abs().max() / reference.abs().max()
        assert off <= tolerance, f"{key} off by {off:.2e} of the largest value"


@all_detectors
@rebuilt_or_kept
@both_precisions
def test_losses_and_gradients_of_a_training_step(name: str, recompute: bool, dtype: torch.dtype) -> None:
    case = load(name)
    detector = build_detector(case, recompute=recompute, dtype=dtype).train()
    frames, mask = inputs(case, dtype)
    truth = batch_actions(case)
    # Ground truth is stored in grid steps: a timeline of one second per step, told in frames.
    per_frame = STEPS.coarsen(detector.num_steps / frames.shape[2])
    losses = detector.loss(detector(frames, mask), truth, [per_frame] * len(truth), num_frames=frames.shape[2])
    reference = case.arrays["loss_train" if dtype == torch.float32 else "loss_train_f64"]
    ours = [losses[part].item() for part in ("classification", "regression", "total")]
    np.testing.assert_allclose(ours, reference[:3], rtol=LOSS_TOLERANCE)

    losses["total"].backward()
    video, own = video_names(case), dict(detector.backbone.named_parameters())
    gradients = {theirs: own[ours].grad for theirs, ours in video.items() if ours in own}
    gradients |= {
        public_name(key, localizer=detector.localizer, layout="opentad"): parameter.grad
        for key, parameter in detector.localizer.named_parameters()
    }
    arrays = dict(case.arrays)
    arrays.setdefault("param_grad_probe", arrays["param_grad_probe_f64"])
    ordered = [gradients[theirs] for theirs in case.arrays["param_names"].tolist()]
    check_gradients(Case(name, arrays, {}, {}), frames, ordered, GRADIENT_TOLERANCES)


@all_detectors
def test_detections_from_the_frames(name: str) -> None:
    case = load(name)
    detector = build_detector(case, recompute=True, dtype=torch.float32).eval()
    with torch.no_grad():
        outputs = detector(*inputs(case, torch.float32))
    for clip, candidates in enumerate(detector.localizer.candidates(outputs)):
        ours = suppress(Detections(*candidates), suppression(case.config["nms"]))
        check_same(ours, stored(case.arrays, "nms", clip), unsure=2)
