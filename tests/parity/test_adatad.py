"""Whole detectors of AdaTAD from uint8 frames, imported as a user does it: frozen VideoMAE, adapters, ActionFormer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from parity.compare import check_gradients, largest_error
from parity.detections import check_same, stored
from parity.pyramids import STEPS, batch_actions, opentad_config
from parity.sizes import adapter_fields, videomae_size
from parity.suppressions import suppression
from parity.test_detector import GRADIENT_TOLERANCES, LOSS_TOLERANCE, VIDEO_PREFIX
from parity.test_detector import inputs as rounded_inputs
from parity.vectors import Case, cases, load
from torch import Tensor

from re2tal.backbones import BACKBONES, BackboneConfig
from re2tal.backbones.hub import videomae
from re2tal.backbones.hub.videomae_layouts import MMACTION
from re2tal.config import DataConfig, RunConfig
from re2tal.conversion import export_detector, import_detector
from re2tal.data.streaming.stream import ClipConfig
from re2tal.data.streaming.windows import ResizeWhole
from re2tal.detector import TemporalActionDetector, resample
from re2tal.evaluation.suppression import suppress
from re2tal.localizers.weights import public_name
from re2tal.structures import Detections

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
OUTPUT = {torch.float32: 2e-5, torch.float64: 1e-8}
every_case = pytest.mark.parametrize("name", cases("det_adatad"))
both_precisions = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


def case_config(case: Case, **fields: object) -> RunConfig:
    num_classes = case.config["rpn_head"]["num_classes"]
    backbone = BackboneConfig(name="videomae_case", beta=0.0, **adapter_fields(case.config["backbone"]))
    return RunConfig(
        num_steps=case.config["num_steps"],
        data=DataConfig(clips=ClipConfig(windowing=ResizeWhole(num_frames=case.arrays["frames"].shape[3]))),
        backbone=replace(backbone, **fields),
        localizer=replace(opentad_config(case.config), class_agnostic=num_classes == 1),
        suppression=suppression(case.config["nms"]),
    )


@pytest.fixture
def imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Imports the file that OpenTAD's trainer would write: its moving average under data-parallel names."""

    def detector(
        name: str, *, state: dict[str, Tensor] | None = None, **fields: object
    ) -> tuple[Case, TemporalActionDetector]:
        case = load(name) if state is None else replace(load(name), state=state)
        monkeypatch.setitem(videomae.SIZES, "videomae_case", videomae_size(case.config["backbone"]))
        monkeypatch.setitem(BACKBONES, "videomae_case", videomae.build)
        averaged = {f"module.{key}": value for key, value in case.state.items()}
        torch.save({"epoch": 59, "state_dict": {}, "state_dict_ema": averaged}, tmp_path / "epoch_59.pth")
        num_classes = case.config["rpn_head"]["num_classes"]
        classes = [str(index) for index in range(num_classes)]
        found, report = import_detector(tmp_path / "epoch_59.pth", case_config(case, **fields), classes=classes)
        assert report.ignored == report.kept == ()
        assert report.taken_from == "state_dict_ema"
        return case, found

    return detector


def inputs(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Normalised frames, in float64 not rounded to float32 on the way, and their mask."""
    frames, mask = rounded_inputs(case, dtype)
    if dtype == torch.float64:
        mean, std = (torch.tensor(of)[:, None, None, None].to(dtype) for of in (MEAN, STD))
        frames = (case.tensor("frames").flatten(0, 1).to(dtype) - mean) / std
    return frames, mask


@every_case
@both_precisions
def test_features_and_predictions(name: str, dtype: torch.dtype, imported) -> None:
    case, detector = imported(name)
    detector = detector.to(dtype).eval()
    with torch.no_grad():
        values = resample(detector.backbone(*inputs(case, dtype)).values, num_steps=detector.num_steps)
        outputs = detector(*inputs(case, dtype))
    suffix = "" if dtype == torch.float32 else "_f64"
    assert largest_error(values, case.arrays["feat_backbone" + suffix]) <= OUTPUT[dtype]
    valid = case.tensor("point_masks")
    for ours, key in ((outputs.logits, "cls_logits"), (outputs.offsets, "reg_offsets")):
        reference = case.tensor(key + suffix)
        off = (ours.double() - reference.double())[valid].abs().max() / reference.abs().max()
        assert off <= OUTPUT[dtype], f"{key} off by {off:.2e} of the largest value"


@every_case
@both_precisions
def test_losses_and_gradients_of_a_training_step(name: str, dtype: torch.dtype, imported) -> None:
    case, detector = imported(name)
    detector = detector.to(dtype).train()
    frames, mask = inputs(case, dtype)
    truth = batch_actions(case)
    per_frame = STEPS.coarsen(detector.num_steps / frames.shape[2])
    losses = detector.loss(detector(frames, mask), truth, [per_frame] * len(truth), num_frames=frames.shape[2])
    suffix = "" if dtype == torch.float32 else "_f64"
    ours = [losses[part].item() for part in ("classification", "regression", "total")]
    np.testing.assert_allclose(ours, case.arrays["loss_train" + suffix][:3], rtol=LOSS_TOLERANCE)

    losses["total"].backward()
    gradients: dict[str, Tensor | None] = {
        public_name(key, localizer=detector.localizer, layout="opentad"): parameter.grad
        for key, parameter in detector.localizer.named_parameters()
    }
    trained = {key: one.grad for key, one in detector.backbone.named_parameters() if one.grad is not None}
    assert all(".adapter." in key for key in trained)
    gradients |= {VIDEO_PREFIX + theirs: trained[key] for key, theirs in MMACTION.from_ours(trained).items()}
    arrays = dict(case.arrays)
    arrays.setdefault("param_grad_probe", arrays["param_grad_probe_f64"])
    # The peer's last norm has a gradient, but is not in its optimizer; here it is frozen too.
    last = np.char.startswith(arrays["param_names"], f"{VIDEO_PREFIX}norm.")
    arrays |= {key: np.where(last, np.nan, value) for key, value in arrays.items() if key.startswith("param_grad")}
    ordered = [gradients.get(theirs) for theirs in case.arrays["param_names"].tolist()]
    check_gradients(replace(case, arrays=arrays), frames, ordered, GRADIENT_TOLERANCES)


@every_case
def test_detections_from_the_frames(name: str, imported) -> None:
    case, detector = imported(name)
    with torch.no_grad():
        outputs = detector.eval()(*inputs(case, torch.float32))
    for clip, candidates in enumerate(detector.localizer.candidates(outputs)):
        ours = suppress(Detections(*candidates), suppression(case.config["nms"]))
        check_same(ours, stored(case.arrays, "nms", clip), unsure=2)


@every_case
def test_a_network_that_norms_its_tokens_is_imported_as_such(name: str, imported) -> None:
    state, ending = load(name).state, f"{VIDEO_PREFIX}norm."
    width = load(name).config["backbone"]["embed_dims"]
    norm = {"weight": torch.linspace(0.5, 2.0, width), "bias": torch.linspace(-1.0, 1.0, width)}
    state = {key: value for key, value in state.items() if not key.startswith((f"{VIDEO_PREFIX}fc_norm.", ending))}
    state |= {ending + key: value for key, value in norm.items()}
    case, detector = imported(name, state=state)
    last = detector.backbone.encoder.model.videomae.layernorm
    for key, parameter in last.named_parameters():
        assert torch.equal(parameter, norm[key])
        assert not parameter.requires_grad
    assert export_detector(detector, config=case_config(case).backbone).keys() == state.keys()


@every_case
def test_it_goes_back_as_it_came_and_without_its_adapters_is_refused(name: str, imported) -> None:
    case, detector = imported(name)
    back = export_detector(detector, config=case_config(case).backbone)
    assert back.keys() == case.state.keys()
    for key, value in case.state.items():
        assert torch.equal(back[key], value.to(back[key].dtype)), key
    with pytest.raises(ValueError, match=r"AdaTAD's adapters, and backbone\.adapter is 'none'; set it to 'temporal'"):
        imported(case.name, adapter="none", adapter_blocks=None, adapter_ratio=0.25)
    first = case.config["backbone"]["adapter_index"][0]
    others = [key for key in case.state if ".adapter." in key and f".blocks.{first}." not in key]
    if others:
        unexpected = rf"{len(others)} unexpected: encoder\.model\.videomae\.encoder\.layer\.\d+\.adapter"
        with pytest.raises(ValueError, match=unexpected):
            imported(case.name, adapter_blocks=(first,))
    with pytest.raises(ValueError, match="was trained with a plain backbone"):
        imported(case.name, beta=1.0)
