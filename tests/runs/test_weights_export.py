"""Exported weights say how their network was rewired, so that another wiring does not take them without a word."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import re2tal
from re2tal.backbones import BackboneConfig, build_backbone, check_wiring, trained_wiring
from re2tal.config import build_detector, load_config, save_config
from re2tal.conversion import export_backbone
from re2tal.recipes import find_recipe
from re2tal.rewire import wiring_of
from re2tal.runs.start import build_from
from re2tal.runs.trained import load_detector, open_detector
from re2tal.runs.weights_export import export_run, export_weights
from re2tal.training.export import clip_frames_of, read_model, write_model

CLASSES = ("jump", "run")


def run_folder(folder: Path, **backbone: Any) -> Path:
    config = replace(find_recipe("demo"), backbone=BackboneConfig(**backbone))
    detector = build_detector(config, CLASSES)
    folder.mkdir()
    facts = {"wiring": wiring_of(detector), "clip_frames": clip_frames_of(detector)}
    write_model(folder / "model.safetensors", detector.state_dict(), classes=CLASSES, **facts)
    save_config(folder / "config.json", config)
    return folder


@pytest.mark.parametrize(
    ("name", "to", "out"),
    [
        ("swin3d_nano", "original", "out.safetensors"),
        ("videomae_nano", "mmaction2", "out.safetensors"),
        ("videomae_nano", "transformers", "out"),
    ],
)
def test_a_plain_network_refuses_what_a_rewired_run_exported(name, to, out, tmp_path):
    run = run_folder(tmp_path / "run", name=name, merge="extrapolate", segment=2)
    export_run(tmp_path / out, run=run, to=to)
    exported = BackboneConfig(name=name, weights=str(tmp_path / out))
    check_wiring(replace(exported, merge="extrapolate", segment=2))
    for other in (replace(exported, rewired=False), exported):
        with pytest.raises(ValueError, match=r"was trained rewired with .*'merge': 'extrapolate'"):
            check_wiring(other)
    if to != "transformers":
        export_weights(tmp_path / "again.safetensors", weights=tmp_path / out, backbone=name, to="original")
        again = trained_wiring(replace(exported, weights=str(tmp_path / "again.safetensors")))
        assert again == trained_wiring(exported)
    else:
        assert json.loads((tmp_path / out / "config.json").read_text())["re2tal_wiring"]["segment"] == 2


def test_weights_say_how_long_clips_are_where_no_tensor_does(tmp_path):
    from transformers import VJEPA2Config, VJEPA2Model

    from re2tal.backbones.hub.vjepa2 import SIZES

    for frames in (8, 4):
        sizes = SIZES["vjepa2_nano"] | {"frames_per_clip": frames}
        VJEPA2Model(VJEPA2Config(**sizes)).save_pretrained(tmp_path / f"clips-of-{frames}")
    run = run_folder(tmp_path / "run", name="vjepa2_nano", weights=str(tmp_path / "clips-of-8"))
    export_run(tmp_path / "out.safetensors", run=run, to="original")
    export_run(tmp_path / "folder", run=run, to="transformers")
    export_run(tmp_path / "model", run=run, to="re2tal")
    for name in ("run/model.safetensors", "out.safetensors", "model/model.safetensors"):
        with pytest.raises(ValueError, match=r"trained on clips of 8 frames, .* clips of 4; give the folder or"):
            build_backbone(BackboneConfig(name="vjepa2_nano", weights=str(tmp_path / name)))
    again = build_backbone(BackboneConfig(name="vjepa2_nano", weights=str(tmp_path / "folder")))
    assert clip_frames_of(again) == clip_frames_of(open_detector(run).network()) == 8
    re2tal.load_detector(run, device="cpu").save_pretrained(tmp_path / "saved")
    assert read_model(tmp_path / "saved" / "model.safetensors").clip_frames == 8
    # Another folder in the place of the one it was trained from.
    config = load_config(run / "config.json")
    other = replace(config, backbone=replace(config.backbone, weights=str(tmp_path / "clips-of-4")))
    with pytest.raises(ValueError, match=r"trained on clips of 8 frames, and the backbone here takes 4"):
        load_detector(run, other)
    with pytest.raises(ValueError, match=r"trained on clips of 8 frames, and the backbone here takes 4"):
        build_from(other, CLASSES, run / "model.safetensors")


def test_a_name_on_the_hub_says_how_it_was_rewired_too(tmp_path, monkeypatch):
    export_run(tmp_path / "out", run=run_folder(tmp_path / "run", name="vit_nano"), to="transformers")
    saved = tmp_path / "hub" / "models--someone--rewired"
    (saved / "refs").mkdir(parents=True)
    (saved / "refs/main").write_text("0" * 40)
    (saved / "snapshots").mkdir()
    (tmp_path / "out").rename(saved / "snapshots" / ("0" * 40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    exported = BackboneConfig(name="vit_nano", weights="someone/rewired")
    check_wiring(exported)
    with pytest.raises(ValueError, match="someone/rewired was trained rewired with"):
        check_wiring(replace(exported, rewired=False))


@pytest.mark.parametrize("record", ["branch", "3", "[1]"])
def test_a_record_that_is_no_wiring_is_refused(record, tmp_path):
    config = BackboneConfig(name="swin3d_nano", weights=str(tmp_path / "odd.safetensors"), rewired=False)
    save_file({"weight": torch.zeros(1)}, tmp_path / "odd.safetensors", metadata={"wiring": record})
    with pytest.raises(ValueError, match=r"wiring in the header of .*odd\.safetensors is .* not how a network was"):
        check_wiring(config)


@pytest.mark.parametrize("backbone", [{"rewired": False}, {"beta": 0.0}], ids=["plain", "beta 0"])
def test_a_plain_network_takes_what_computes_like_it(backbone, tmp_path):
    run = run_folder(tmp_path / "run", name="videomae_nano", **backbone)
    for to, out in (("original", "out.safetensors"), ("transformers", "out")):
        export_run(tmp_path / out, run=run, to=to)
        exported = BackboneConfig(name="videomae_nano", weights=str(tmp_path / out), rewired=False)
        assert trained_wiring(exported) is None
        check_wiring(exported)


@pytest.mark.parametrize("adapter", ["none", "temporal"])
def test_a_run_from_a_pretraining_file_opens_without_that_file(adapter, tmp_path):
    plain = build_backbone(BackboneConfig(name="videomae_nano", rewired=False))
    pretrained = export_backbone(plain, name="videomae_nano", to="original")
    # Such files end in a norm over tokens, where those of recognition have one behind the mean.
    file = tmp_path / "pretrained.safetensors"
    save_file({f"encoder.{name.replace('fc_norm', 'norm')}": value for name, value in pretrained.items()}, file)
    run = run_folder(tmp_path / "run", name="videomae_nano", weights=str(file), adapter=adapter)
    trained = build_detector(load_config(run / "config.json"), CLASSES)
    trained.load_state_dict(read_model(run / "model.safetensors").weights)
    file.unlink()
    frames, mask = torch.randn(1, 3, 8, 32, 32), torch.ones(1, 8, dtype=torch.bool)
    with torch.no_grad():
        wanted = trained.eval().backbone(frames, mask).values
        for opened in (open_detector(run).network(), load_detector(run, load_config(run / "config.json"))):
            assert torch.equal(opened.eval().backbone(frames, mask).values, wanted)
