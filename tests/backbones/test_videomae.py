"""VideoMAE: checkpoints of the original release, its two kinds of final norm, and pictures of other sizes."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import VideoMAEConfig, VideoMAEForPreTraining

from re2tal.backbones import BackboneConfig, build_backbone
from re2tal.backbones.hub.videomae import SIZES
from re2tal.backbones.hub.videomae_layouts import ORIGINAL
from re2tal.backbones.weights import export_state

CHANNELS, BLOCKS, HEADS = 48, 4, 2


def build(**fields: Any) -> Any:
    return build_backbone(BackboneConfig(name="videomae_nano", rewired=False, **fields)).eval()


def original_state(*, fine_tuned: bool) -> dict[str, Tensor]:
    """Random weights under the names of the original release."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) / 5

    def norm(name: str) -> dict[str, Tensor]:
        return {f"{name}.weight": 1 + random(CHANNELS), f"{name}.bias": random(CHANNELS)}

    hidden = 4 * CHANNELS
    state = {"patch_embed.proj.weight": random(CHANNELS, 3, 2, 8, 8), "patch_embed.proj.bias": random(CHANNELS)}
    for index in range(BLOCKS):
        block = f"blocks.{index}"
        state |= norm(f"{block}.norm1") | norm(f"{block}.norm2")
        state |= {f"{block}.attn.qkv.weight": random(3 * CHANNELS, CHANNELS)}
        state |= {f"{block}.attn.{part}_bias": random(CHANNELS) for part in "qv"}
        state |= {f"{block}.attn.proj.weight": random(CHANNELS, CHANNELS), f"{block}.attn.proj.bias": random(CHANNELS)}
        state |= {f"{block}.mlp.fc1.weight": random(hidden, CHANNELS), f"{block}.mlp.fc1.bias": random(hidden)}
        state |= {f"{block}.mlp.fc2.weight": random(CHANNELS, hidden), f"{block}.mlp.fc2.bias": random(CHANNELS)}
    return state | norm("fc_norm" if fine_tuned else "norm")


def original_features(state: dict[str, Tensor], clip: Tensor, *, fine_tuned: bool) -> Tensor:
    """(1, 3, 4, 32, 32) -> (1, 2, C), by the equations of the original release; the positions are its sin-cos table."""
    x = F.conv3d(clip, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=(2, 8, 8))
    x = x.flatten(2).transpose(1, 2)
    angles = torch.arange(32)[:, None] / 10000 ** (2 * (torch.arange(CHANNELS) // 2) / CHANNELS)
    x = x + torch.where(torch.arange(CHANNELS) % 2 == 0, angles.sin(), angles.cos())
    for index in range(BLOCKS):
        part = {key.removeprefix(f"blocks.{index}."): value for key, value in state.items()}
        z = F.layer_norm(x, (CHANNELS,), part["norm1.weight"], part["norm1.bias"], eps=1e-6)
        bias = torch.cat([part["attn.q_bias"], torch.zeros(CHANNELS), part["attn.v_bias"]])
        q, k, v = F.linear(z, part["attn.qkv.weight"], bias).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        z = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + F.linear(z, part["attn.proj.weight"], part["attn.proj.bias"])
        z = F.layer_norm(x, (CHANNELS,), part["norm2.weight"], part["norm2.bias"], eps=1e-6)
        z = F.gelu(F.linear(z, part["mlp.fc1.weight"], part["mlp.fc1.bias"]))
        x = x + F.linear(z, part["mlp.fc2.weight"], part["mlp.fc2.bias"])
    if fine_tuned:
        return F.layer_norm(
            x.reshape(1, 2, 16, -1).mean(2), (CHANNELS,), state["fc_norm.weight"], state["fc_norm.bias"]
        )
    return F.layer_norm(x, (CHANNELS,), state["norm.weight"], state["norm.bias"]).reshape(1, 2, 16, -1).mean(2)


@pytest.mark.parametrize("fine_tuned", [True, False], ids=["fine-tuned", "pre-trained"])
@torch.no_grad()
def test_a_checkpoint_of_the_original_release_gives_the_features_of_its_equations(tmp_path, fine_tuned: bool) -> None:
    state = original_state(fine_tuned=fine_tuned)
    if fine_tuned:
        content = {"module": state | {"head.weight": torch.zeros(7, CHANNELS), "head.bias": torch.zeros(7)}}
    else:
        # Its decoder holds blocks of the same names.
        decoder = {f"decoder.{key}": value for key, value in state.items() if key.startswith(("blocks.0", "norm"))}
        state_under_encoder = {f"encoder.{key}": value for key, value in state.items()}
        content = {"model": state_under_encoder | decoder | {"mask_token": torch.zeros(1, 1, CHANNELS)}}
    content |= {"epoch": 799, "args": Namespace(model="vit", lr=1e-3, betas=[0.9, 0.95])}
    torch.save(content, tmp_path / "checkpoint.pth")
    backbone = build(weights=str(tmp_path / "checkpoint.pth"))
    clip = torch.randn(1, 3, 4, 32, 32)
    values = backbone(clip, torch.ones(1, 4, dtype=torch.bool)).values.transpose(1, 2)
    wanted = original_features(state, clip, fine_tuned=fine_tuned)
    torch.testing.assert_close(values, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fine_tuned", [True, False], ids=["fine-tuned", "pre-trained"])
def test_weights_go_back_to_the_original_layout_unchanged(tmp_path, fine_tuned: bool) -> None:
    state = original_state(fine_tuned=fine_tuned)
    torch.save(state, tmp_path / "checkpoint.pth")
    exported = export_state(build(weights=str(tmp_path / "checkpoint.pth")), layout=ORIGINAL)
    assert {*exported} == {*state}
    assert all(torch.equal(value, state[key]) for key, value in exported.items())


def test_a_checkpoint_of_another_size_is_refused_with_its_shapes(tmp_path) -> None:
    state = original_state(fine_tuned=True) | {"blocks.0.norm1.weight": torch.ones(64), "blocks.0.what": torch.ones(1)}
    torch.save(state, tmp_path / "checkpoint.pth")
    with pytest.raises(
        ValueError,
        match=r"original VideoMAE layout\) does not fit.*1 unexpected.*blocks\.0\.what; 1 of another shape.*\(64,\)",
    ):
        build(weights=str(tmp_path / "checkpoint.pth"))


@torch.no_grad()
def test_pretraining_folders_bring_their_norm_and_lack_fc_norm(tmp_path) -> None:
    config = VideoMAEConfig(**SIZES["videomae_nano"], intermediate_size=192, use_mean_pooling=False)
    stock = VideoMAEForPreTraining(config).eval()
    stock.videomae.layernorm.weight.uniform_(0.5, 2)
    stock.save_pretrained(tmp_path)
    clip = torch.randn(1, 3, 4, 32, 32)
    values = build(weights=str(tmp_path))(clip, torch.ones(1, 4, dtype=torch.bool)).values
    wanted = stock.videomae(clip.transpose(1, 2)).last_hidden_state.reshape(1, 2, 16, -1).mean(2)
    torch.testing.assert_close(values.transpose(1, 2), wanted, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_other_picture_sizes_resample_the_positions(monkeypatch) -> None:
    backbone = build()
    embeddings = backbone.encoder.model.videomae.embeddings
    projection = embeddings.patch_embeddings.projection
    torch.nn.init.zeros_(projection.weight)
    torch.nn.init.zeros_(projection.bias)
    table = embeddings(torch.zeros(1, 4, 3, 32, 32), None)
    resampled = embeddings(torch.zeros(1, 4, 3, 48, 16), None)
    pictures = table.reshape(2, 4, 4, -1).permute(0, 3, 1, 2)
    wanted = F.interpolate(pictures, size=(6, 2), mode="bicubic").permute(0, 2, 3, 1).reshape(1, 24, -1)
    torch.testing.assert_close(resampled, wanted)


def test_weights_file_may_sit_in_any_folder(tmp_path: Path) -> None:
    torch.save(original_state(fine_tuned=True), tmp_path / "some.pt")
    assert build(weights=str(tmp_path / "some.pt")).encoder.model.fc_norm is not None
