"""`re2tal rewire` of models that are no backbone of ours: tiny ones, random, of families that nobody registered."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import (
    BeitConfig,
    BeitModel,
    ConvNextConfig,
    ConvNextModel,
    PreTrainedModel,
    SwinConfig,
    SwinModel,
    VideoMAEConfig,
    VideoMAEModel,
)

from re2tal.cli import main

VIT = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64, "patch_size": 8}


def beit() -> PreTrainedModel:
    return BeitModel(BeitConfig(**VIT, image_size=32))


def swin() -> PreTrainedModel:
    return SwinModel(
        SwinConfig(image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 2], window_size=4)
    )


def convnext() -> PreTrainedModel:
    return ConvNextModel(ConvNextConfig(hidden_sizes=[16, 32], depths=[2, 2], num_stages=2, image_size=32))


def videomae() -> PreTrainedModel:
    return VideoMAEModel(VideoMAEConfig(**VIT, image_size=32, num_frames=4))


def run(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as end:
        main(["rewire", *arguments])
    assert isinstance(end.value.code, int)
    return end.value.code


@pytest.mark.parametrize(
    ("build", "stages", "what"),
    [
        (beit, [("layers", 3)], "one picture of 32 x 32"),
        (swin, [("encoder.layers.0.blocks", 2), ("encoder.layers.1.blocks", 2)], "one picture of 32 x 32"),
        (convnext, [("encoder.stages.0.layers", 2), ("encoder.stages.1.layers", 2)], "one picture of 32 x 32"),
        (videomae, [("encoder.layer", 3)], "4 frames of 32 x 32"),
    ],
)
def test_blocks_nobody_registered_are_found(capsys, tmp_path: Path, build, stages, what: str) -> None:
    model = build()
    model.save_pretrained(tmp_path)
    assert run([str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    millions = sum(value.numel() for value in model.parameters()) / 1e6
    assert f"{tmp_path}: {type(model).__name__}, {millions:.1f} million parameters\n" in printed
    rows = [line.split()[:3] for line in printed.splitlines()]
    assert all([name, str(blocks), str(blocks)] in rows for name, blocks in stages)
    (kept,) = [line for line in printed.splitlines() if line.startswith("kept from forward")]
    assert f"for {what}, float32" in kept
    plain, rewired = (float(part.split()[-2]) for part in (kept.split(" plain")[0], kept.split(" rewired")[0]))
    assert 0 < rewired < plain / 2


def test_size_and_frames_may_be_chosen(capsys, tmp_path: Path) -> None:
    convnext().save_pretrained(tmp_path)
    assert run([str(tmp_path), "--size", "64", "32"]) == 0
    assert "one picture of 64 x 32" in capsys.readouterr().out
    assert run([str(tmp_path), "--frames", "8"]) == 2
    assert "frames is 8, but a ConvNextModel takes single pictures; leave it out" in capsys.readouterr().err


def test_pickled_weights_are_refused(capsys, tmp_path: Path) -> None:
    model = beit()
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    assert run([str(tmp_path)]) == 2
    assert "holds no weights in safetensors files" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (
            {"model_type": "homemade", "auto_map": {"AutoModel": "modeling.Homemade"}},
            "type 'homemade', which the installed transformers library does not know; it asks to run code that it "
            "brings, which is never done",
        ),
        ({"model_type": "bert"}, "a BertModel, which takes input_ids first and not pixel_values"),
    ],
)
def test_foreign_code_and_other_inputs_are_refused(capsys, tmp_path: Path, found: dict, message: str) -> None:
    beit().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(found))
    (tmp_path / "modeling.py").write_text("raise SystemExit('run')")
    capsys.readouterr()  # the library's progress
    assert run([str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line


def test_a_hub_name_without_a_network_says_what_to_do(capsys, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert run(["nobody/no-such-model"]) == 2
    error = capsys.readouterr().err
    assert "cannot read 'nobody/no-such-model' from the model hub or its cache" in error
    assert "hf download nobody/no-such-model --local-dir FOLDER" in error


def test_weights_of_its_own_exclude_others(capsys, tmp_path: Path) -> None:
    assert run([str(tmp_path), "--weights", "elsewhere"]) == 2
    assert "weights is 'elsewhere'" in capsys.readouterr().err
