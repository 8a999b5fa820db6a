"""V-JEPA 2: files of the original release, whose encoder is there twice, and the first V-JEPA, which is another one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from re2tal.backbones import BackboneConfig, build_backbone
from re2tal.backbones.hub.vjepa2_layouts import ORIGINAL
from re2tal.backbones.weights import export_state, read_checkpoint


def build(**fields: Any) -> Any:
    return build_backbone(BackboneConfig(name="vjepa2_nano", rewired=False, **fields))


def original_state(backbone: Any) -> dict[str, Tensor]:
    """The entries that the release has for these weights, written down from its names."""
    ours = {key.removeprefix("encoder.model.encoder."): value for key, value in backbone.state_dict().items()}
    state = {f"patch_embed.proj.{end}": ours[f"embeddings.patch_embeddings.proj.{end}"] for end in ("weight", "bias")}
    state |= {f"norm.{end}": ours[f"layernorm.{end}"] for end in ("weight", "bias")}
    for index in range(4):
        layer, block = f"layer.{index}", f"blocks.{index}"
        for end in ("weight", "bias"):
            parts = [ours[f"{layer}.attention.{part}.{end}"] for part in ("query", "key", "value")]
            state[f"{block}.attn.qkv.{end}"] = torch.cat(parts)
            state[f"{block}.attn.proj.{end}"] = ours[f"{layer}.attention.proj.{end}"]
            for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                state[f"{block}.{name}.{end}"] = ours[f"{layer}.{name}.{end}"]
    return state


def test_the_averaged_encoder_of_a_release_file_is_loaded(tmp_path) -> None:
    torch.manual_seed(0)
    source = build()
    averaged = {f"module.backbone.{key}": value for key, value in original_state(source).items()}
    content = {
        "encoder": {key: value + 1 for key, value in averaged.items()},
        "predictor": {"module.backbone.predictor_blocks.0.attn.qkv.weight": torch.ones(3, 3)},
        "target_encoder": averaged,
        "opt": {"state": {0: {"step": torch.ones(())}}},
        "epoch": 12,
    }
    torch.save(content, tmp_path / "vitl.pt")
    assert read_checkpoint(tmp_path / "vitl.pt").taken_from == "target_encoder"
    loaded = build(weights=str(tmp_path / "vitl.pt")).state_dict()
    assert all(torch.equal(value, loaded[key]) for key, value in source.state_dict().items())
    exported = export_state(source, layout=ORIGINAL)
    assert exported.keys() == original_state(source).keys()
    assert all(torch.equal(value, exported[key]) for key, value in original_state(source).items())


def test_the_first_v_jepa_is_refused(tmp_path) -> None:
    state = original_state(build()) | {"pos_embed": torch.zeros(1, 32, 48)}
    torch.save({"target_encoder": state}, tmp_path / "vitl16.pth.tar.pt")
    with pytest.raises(ValueError, match=r"1 unexpected: encoder\.model\.encoder\.pos_embed"):
        build(weights=str(tmp_path / "vitl16.pth.tar.pt"))
