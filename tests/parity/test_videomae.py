"""VideoMAE against mmaction2's, and with AdaTAD's adapters against OpenTAD's: files, values and gradients.

`videomae_mmaction_*` and `videomae_pos_*` are plain networks; `videomae_adapter_*` are windows of several clips.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from parity.compare import Tolerances, check_gradients, check_loss, check_values, largest_error, suffix
from parity.sizes import adapter_fields, videomae_size
from parity.vectors import Case, cases, load
from safetensors.torch import save_file
from torch import Tensor

from re2tal.backbones import BACKBONES, BackboneConfig, build_backbone
from re2tal.backbones.hub import videomae
from re2tal.backbones.hub.tiling import cut
from re2tal.backbones.hub.videomae_layouts import MMACTION
from re2tal.backbones.weights import load_state
from re2tal.detector import resample

TOLERANCES = Tolerances(
    output={torch.float32: 5e-6, torch.float64: 1e-9},
    grad_x={torch.float32: 5e-5},
    loss={torch.float32: 1e-4, torch.float64: 1e-8},
    norm={torch.float32: 2e-5, torch.float64: 1e-8},
    norm_floor={torch.float32: 2e-6, torch.float64: 1e-8},
    probe={torch.float32: 1e-5, torch.float64: 1e-8},
)
PLAIN = cases("videomae_mmaction") + cases("videomae_pos")
ADAPTED = cases("videomae_adapter")
MEAN, STD = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])
both_precisions = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Builds a case's backbone as `backbone.weights` does it: from a file that holds the peer's state dict."""

    def built(case: Case, config: dict[str, Any], dtype: torch.dtype, **fields: Any) -> Any:
        monkeypatch.setitem(videomae.SIZES, "videomae_case", videomae_size(config))
        monkeypatch.setitem(BACKBONES, "videomae_case", videomae.build)
        save_file(case.state, tmp_path / "weights.safetensors")
        weights = str(tmp_path / "weights.safetensors")
        backbone = build_backbone(BackboneConfig(name="videomae_case", weights=weights, rewired=False, **fields))
        if dtype == torch.float64:
            # A layer scale becomes part of weights, which rounds them in float32.
            state = {key: value.to(dtype) for key, value in case.state.items()}
            load_state(backbone.to(dtype), state, layouts=(MMACTION,), what=case.name)
        return backbone.eval()

    return built


def peer_gradients(case: Case, backbone: Any, *, prefix: str = "") -> list[Tensor | None]:
    """In the order of `param_names`; those of a layer scale from those of the layer that it became part of."""
    ours = {name: parameter.grad for name, parameter in backbone.named_parameters() if parameter.grad is not None}
    found = MMACTION.pack({theirs: ours[name] for name, theirs in MMACTION.from_ours(ours).items()})
    for index in range(len(backbone.encoder.model.videomae.encoder.layer)):
        for number, layer in ((1, "attn.proj"), (2, "mlp.layers.1")):
            scale = case.state.get(f"{prefix}blocks.{index}.gamma_{number}")
            if scale is not None:
                weight, bias = f"blocks.{index}.{layer}.weight", f"blocks.{index}.{layer}.bias"
                products = (found[weight] * case.state[prefix + weight]).sum(dim=1)
                found[f"blocks.{index}.gamma_{number}"] = products + found[bias] * case.state[prefix + bias]
                found[weight], found[bias] = found[weight] * scale[:, None], found[bias] * scale
    return [found.get(name.removeprefix(prefix)) for name in case.arrays["param_names"].tolist()]


def as_map(tokens: Tensor, shape: torch.Size, size: dict[str, Any]) -> Tensor:
    """(N, tokens, C) -> (N, C, T', h, w), for clips of (N, T, 3, H, W)."""
    grid = (shape[1] // size.get("tubelet_size", 2), *(pixels // size["patch_size"] for pixels in shape[3:]))
    return tokens.transpose(1, 2).unflatten(2, grid)


def weighed(case: Case, outputs: dict[str, Tensor]) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for name, output in outputs.items():
        total = total + (output * case.tensor(f"w_{name}").to(output)).sum() / output.numel() ** 0.5
    return total.to(next(iter(outputs.values())).dtype)


@pytest.mark.parametrize("name", PLAIN)
@both_precisions
def test_the_plain_network(name: str, dtype: torch.dtype, build) -> None:
    case = load(name)
    size = case.config["arguments"]
    backbone = build(case, size, dtype)
    table = backbone.encoder.model.videomae.embeddings.position_embeddings
    table.requires_grad_("grad_pos_embed" in case.arrays)
    x = case.tensor("x").to(dtype).requires_grad_()
    clips = x.transpose(1, 2)
    tokens = backbone.encoder.tokens(clips)
    outputs = {"map": as_map(tokens, clips.shape, size)}
    if backbone.encoder.model.fc_norm is None:
        outputs["token"] = tokens[:, 0]
    else:
        outputs["pooled"] = backbone.encoder.model.fc_norm(tokens.mean(dim=1))
    check_values(case, {f"out_{key}": value for key, value in outputs.items()}, TOLERANCES, dtype=dtype)
    loss = weighed(case, outputs)
    check_loss(case, loss, TOLERANCES)
    loss.backward()
    gradients = dict(zip(case.arrays["param_names"].tolist(), peer_gradients(case, backbone), strict=True))
    if "pos_embed" in gradients:
        gradients["pos_embed"] = table.grad
        assert largest_error(table.grad, case.arrays["grad_pos_embed"]) <= TOLERANCES.grad_x[torch.float32]
    check_gradients(case, x, list(gradients.values()), TOLERANCES)


@pytest.mark.parametrize("name", cases("videomae_pos"))
def test_positions_of_the_real_size_and_resampled(name: str) -> None:
    case = load(name)
    real = case.config["real_table"]
    grid, new = (real["time"], real["grid"], real["grid"]), (real["time"], *[real["interpolated_grid"]] * 2)
    table = videomae.get_sinusoid_encoding_table(int(np.prod(grid)), real["embed_dims"])
    resampled = videomae.resize_positions(table, grid=grid, new_grid=new)
    for ours, key in ((table, "table"), (resampled, "interp")):
        assert np.abs(ours[0].numpy()[case.arrays[f"{key}_rows"]] - case.arrays[key]).max() <= 1e-6


@pytest.mark.parametrize("name", ADAPTED)
@pytest.mark.parametrize("frozen", [True, False], ids=["adapters train", "all trains"])
@both_precisions
def test_with_adapters(name: str, dtype: torch.dtype, frozen: bool, build) -> None:
    case = load(name)
    size = case.config["backbone"]
    backbone = build(case, size, dtype, **adapter_fields(size))
    if not frozen:
        backbone.requires_grad_(True)
    raw = case.tensor("frames").flatten(0, 1).to(dtype).requires_grad_()
    frames = (raw - MEAN.to(dtype)[:, None, None, None]) / STD.to(dtype)[:, None, None, None]
    mask = torch.ones(len(raw), raw.shape[2], dtype=torch.bool)

    num_frames = size["num_frames"]
    clips = cut(frames, mask, clip_frames=num_frames, clips=range(-(-frames.shape[2] // num_frames)))
    tokens = backbone.encoder.tokens(clips.flatten(0, 1), clips.shape[1])
    feature_map = as_map(tokens, clips.flatten(0, 1).shape, size)
    steps = feature_map.mean(dim=(3, 4)).unflatten(0, clips.shape[:2]).transpose(1, 2).flatten(2)
    feat = resample(steps, num_steps=case.config["interpolate_size"])
    key = suffix(dtype)
    for ours, reference in ((feat, "feat"), (steps, "feat_tokens")):
        assert largest_error(ours, case.arrays[reference + key]) <= TOLERANCES.output[dtype]
    if dtype == torch.float32:
        assert largest_error(feature_map, case.arrays["feat_map"]) <= TOLERANCES.output[dtype]
    with torch.no_grad():
        assert largest_error(backbone(frames, mask).values, steps.detach().numpy()) <= TOLERANCES.output[dtype] / 5

    loss = weighed(case, {"map": feature_map, "feat": feat})
    check_loss(case, loss, TOLERANCES)
    loss.backward()
    arrays = dict(case.arrays, grad_x=case.arrays["grad_frames"][:, 0])
    if frozen:
        # The peer's last norm has a gradient, but is not in its optimizer; here it is frozen too.
        last = np.char.startswith(arrays["param_names"], "model.backbone.norm.")
        arrays |= {key: np.where(last, np.nan, value) for key, value in arrays.items() if key.startswith("param_grad")}
    else:
        kinds = [f"grad_{kind}{end}" for kind in ("norm", "probe") for end in ("", "_f64")]
        arrays |= {f"param_{kind}": arrays[f"unfrozen_{kind}"] for kind in kinds}
    gradients = peer_gradients(case, backbone, prefix="model.backbone.")
    check_gradients(replace(case, arrays=arrays), raw, gradients, TOLERANCES)
