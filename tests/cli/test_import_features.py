"""`re2tal import` of detectors on stored features: OpenTAD's, and those of ActionFormer's release."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from parity.pyramids import build as build_pyramid
from parity.pyramids import original_config
from parity.test_actionformer import training_batch
from parity.vectors import cases, load
from torch import Tensor

from re2tal.backbones import BackboneConfig
from re2tal.cli import main
from re2tal.config import DataConfig, RunConfig, load_config, save_config
from re2tal.data.streaming.stream import ClipConfig
from re2tal.data.streaming.windows import Slide
from re2tal.localizers import LocalizerConfig
from re2tal.runs.trained import load_detector


def run_import(folder: Path, state: dict[str, Tensor], localizer: LocalizerConfig, *, channels: int, steps: int) -> int:
    """Of a file such as the trainers write, beside a config.json and classes.txt."""
    averaged = {f"module.{key}": value for key, value in state.items()}
    content = {"epoch": 7, "state_dict": {key: value + 1 for key, value in averaged.items()}}
    torch.save(content | {"optimizer": {"state": {}}, "state_dict_ema": averaged}, folder / "epoch_7.pth.tar.pth")
    clips = ClipConfig(windowing=Slide(num_frames=steps, frames_per_second=None))
    backbone = BackboneConfig(name="features", feature_channels=channels, rewired=False)
    config = RunConfig(num_steps=steps, data=DataConfig(clips=clips), backbone=backbone, localizer=localizer)
    save_config(folder / "config.json", config)
    options = ["--config", folder / "config.json", "--classes", folder / "classes.txt", "--out", folder / "run"]
    with pytest.raises(SystemExit) as ended:
        main([str(one) for one in ("import", folder / "epoch_7.pth.tar.pth", *options)])
    return ended.value.code


def write_classes(folder: Path, number: int) -> None:
    (folder / "classes.txt").write_text("".join(f"class {index}\n" for index in range(number)))


@pytest.mark.parametrize("name", cases("actionformer"))
def test_actionformers_release_gives_its_logits(name: str, tmp_path: Path, capsys) -> None:
    case = load(name)
    arguments = case.config["arguments"]
    write_classes(tmp_path, arguments["num_classes"])
    localizer = replace(original_config(case.config), class_agnostic=arguments["num_classes"] == 1)
    # Buffers of the release that no layer holds.
    state = case.state | {"point_generator.buffer_points.0": torch.zeros(4, 4)}
    feats, masks = training_batch(case, "original", torch.float32)
    sizes = {"channels": feats.shape[1], "steps": feats.shape[2]}
    assert run_import(tmp_path, state, localizer, **sizes) == 0
    said = capsys.readouterr().out
    assert "weights of its state_dict_ema, localizer in the layout of original" in said
    assert "1 have no use" in said
    detector = load_detector(tmp_path / "run", load_config(tmp_path / "run" / "config.json")).eval()
    with torch.no_grad():
        outputs = detector(feats, masks)
    valid, reference = case.tensor("train_mask"), case.tensor("train_cls_logits")
    assert ((outputs.logits - reference)[valid].abs().max() / reference.abs().max()).item() <= 2e-5


@pytest.mark.parametrize("name", [*cases("tridet")[-1:], *cases("temporalmaxer")[-1:]])
def test_opentads_detectors_on_features_give_their_logits(name: str, tmp_path: Path) -> None:
    case = load(name)
    head = case.config["detector"]["rpn_head"]
    write_classes(tmp_path, head["num_classes"])
    localizer = replace(build_pyramid(case).config, class_agnostic=head["num_classes"] == 1)
    feats, masks = case.tensor("feats"), case.tensor("masks")
    sizes = {"channels": feats.shape[1], "steps": feats.shape[2]}
    assert run_import(tmp_path, case.state, localizer, **sizes) == 0
    detector = load_detector(tmp_path / "run", load_config(tmp_path / "run" / "config.json")).eval()
    with torch.no_grad():
        outputs = detector(feats, masks)
    valid, reference = case.tensor("point_masks"), case.tensor("cls_logits")
    assert ((outputs.logits - reference)[valid].abs().max() / reference.abs().max()).item() <= 2e-5


def test_what_is_not_a_detector_on_these_features_is_refused(tmp_path: Path, capsys) -> None:
    name = cases("actionformer")[-1]
    case = load(name)
    arguments = case.config["arguments"]
    write_classes(tmp_path, arguments["num_classes"])
    localizer = replace(original_config(case.config), class_agnostic=arguments["num_classes"] == 1)
    sizes = {"channels": arguments["input_dim"], "steps": arguments["max_seq_len"]}

    def refused(message: str, state: dict[str, Tensor], **changed: int) -> None:
        assert run_import(tmp_path, state, localizer, **(sizes | changed)) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "run").exists()

    video = {"backbone.model.backbone.blocks.0.norm1.weight": torch.ones(3)}
    refused("holds a video network too (under backbone.model.backbone.)", case.state | video)
    refused("check the config's channels", case.state, channels=sizes["channels"] + 1)
    gone = "neck.fpn_norms.1.weight"
    refused(f"missing 1 ({gone})", {key: value for key, value in case.state.items() if key != gone})
    refused("holds no localizer (nothing under backbone., neck., cls_head., reg_head.)", {"fc.weight": torch.ones(3)})
