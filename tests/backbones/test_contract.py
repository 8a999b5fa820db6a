"""Every row of BACKBONES keeps the contract of base.py, plain and rewired."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from re2tal.backbones import BACKBONES, BackboneConfig, build_backbone
from re2tal.backbones.base import VideoBackbone, freeze_norms, norm_layers
from re2tal.backbones.hub.tiling import ClipwiseBackbone
from re2tal.backbones.slowfast.network import InnerReluBottleneck, SlowFast
from re2tal.rewire import RewiringConfig, rewire

# Odd in every axis, so that a family that pads must do so; families bound to whole patches get what they were made for.
SHAPE = (2, 3, 7, 37, 33)
WHOLE_PATCHES = (2, 3, 7, 32, 32)

# Sizes of a family share every line of code, so the first row of each builder stands for it.
FAMILIES = {build: name for name, build in reversed(BACKBONES.items())}
every_backbone = pytest.mark.parametrize("name", sorted(FAMILIES.values()))
both_forms = pytest.mark.parametrize("rewired", [False, True], ids=["plain", "rewired"])


def build(name: str, **fields: object) -> VideoBackbone:
    torch.manual_seed(0)
    return build_backbone(BackboneConfig(name=name, **fields))


def clip(backbone: VideoBackbone) -> tuple[torch.Tensor, torch.Tensor]:
    shape = WHOLE_PATCHES if isinstance(backbone, ClipwiseBackbone) else SHAPE
    frames = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(SHAPE[0], SHAPE[2], dtype=torch.bool)
    mask[1, 4:] = False
    return frames, mask


def uneven(values: Tensor) -> Tensor:
    """A loss in which no two elements of the features weigh the same."""
    return (values * torch.linspace(-1, 1, values.numel(), dtype=values.dtype).view_as(values)).sum()


def features_and_gradients(backbone: VideoBackbone, frames: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Features, and the gradient of every parameter that has one, under an uneven loss."""
    values = backbone(frames, mask).values
    uneven(values).backward()
    return {"features": values.detach()} | {
        key: parameter.grad for key, parameter in backbone.named_parameters() if parameter.grad is not None
    }


def freeze_norms_at_statistics_of(frames: Tensor, slowfast: SlowFast) -> None:
    """Without any statistics values grow from block to block, and beyond every grid."""
    for norm in norm_layers(slowfast):
        norm.momentum = 1.0
    with torch.no_grad():
        slowfast(frames, torch.ones(len(frames), frames.shape[2], dtype=torch.bool))
    freeze_norms(slowfast)


def assert_gradients_close(found: dict[str, Tensor], wanted: dict[str, Tensor], *, relative: float) -> None:
    """Each by its norm. Some, of key biases, are zero but for rounding: they are compared with the others' scale."""
    assert found.keys() == wanted.keys()
    floor = 1e-3 * max(float(gradient.norm()) for gradient in wanted.values())
    for key, gradient in wanted.items():
        assert float((found[key] - gradient).norm()) <= relative * max(float(gradient.norm()), floor), key


@every_backbone
@both_forms
def test_features_have_the_published_channels_steps_and_mask(name: str, rewired: bool) -> None:
    backbone = build(name, rewired=rewired).eval()
    frames, mask = clip(backbone)
    with torch.no_grad():
        features = backbone(frames, mask)
    steps = -(-SHAPE[2] // backbone.frames_per_step)
    assert features.values.shape == (SHAPE[0], backbone.out_channels, steps)
    assert features.values.dtype == torch.float32
    assert torch.isfinite(features.values).all()
    first_frames = mask[:, :: backbone.frames_per_step]
    assert features.mask.dtype == torch.bool
    assert features.mask.tolist() == first_frames.tolist()


@every_backbone
@both_forms
def test_a_gradient_reaches_the_input_and_every_parameter(name: str, rewired: bool) -> None:
    backbone = build(name, rewired=rewired)
    frames, mask = clip(backbone)
    frames.requires_grad_()
    values = backbone(frames, mask).values
    (values * torch.linspace(-1, 1, values.numel()).view_as(values)).sum().backward()
    assert frames.grad.abs().sum() > 0
    assert [key for key, parameter in backbone.named_parameters() if parameter.grad is None] == []


@every_backbone
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)], ids=str)
def test_rebuilding_activations_changes_neither_features_nor_gradients(
    name: str, dtype: torch.dtype, tolerance: float
) -> None:
    results = []
    for recompute in (True, False):
        backbone = build(name, recompute=recompute).to(dtype)
        frames, mask = clip(backbone)
        results.append(features_and_gradients(backbone, frames.to(dtype), mask))
    assert_gradients_close(*results, relative=tolerance)


@pytest.mark.parametrize("norm_eval", [True, False])
def test_relus_stay_on_or_off_when_a_deep_slowfast_is_rebuilt(norm_eval: bool) -> None:
    """SlowFast-101, thin. A rounding turns a unit on or off for some seed, and gradients are then off by percents."""
    frames = torch.randn(2, 3, 8, 64, 64, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, 8, dtype=torch.bool)

    def gradients(seed: int, **options: Any) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        slowfast = SlowFast(depths=(3, 4, 23, 3), base_channels=8, channel_ratio=4, block=InnerReluBottleneck)
        if norm_eval:
            freeze_norms_at_statistics_of(frames, slowfast)
        rewire(slowfast, config=RewiringConfig(**options))
        return features_and_gradients(slowfast, frames, mask)

    for seed in range(4):
        kept, rebuilt = gradients(seed, recompute=False), gradients(seed)
        assert [key for key, value in kept.items() if not torch.equal(value, rebuilt[key])] == []


@every_backbone
@pytest.mark.parametrize("size", [(16, 24), (48, 48), (16, 64)], ids=str)
def test_frames_of_any_size_are_taken_and_rewired(name: str, size: tuple[int, int]) -> None:
    """Smaller and larger than the 32 x 32 of training, not square, and with as many patches in another shape."""
    frames = torch.randn(2, 3, 5, *size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mask = torch.ones(2, 5, dtype=torch.bool)
    results = []
    for recompute in (True, False):
        backbone = build(name, recompute=recompute).double()
        results.append(features_and_gradients(backbone, frames, mask))
    assert results[0]["features"].shape == (2, backbone.out_channels, -(-5 // backbone.frames_per_step))
    assert results[0].keys() == {"features", *(key for key, _ in backbone.named_parameters())}
    assert_gradients_close(*results, relative=1e-10)


@every_backbone
@pytest.mark.parametrize("unit", ["branch", "block"])
def test_videos_of_two_sizes_may_wait_for_one_backward(name: str, unit: str) -> None:
    backbone = build(name, unit=unit).double().eval()
    mask = torch.ones(1, 4, dtype=torch.bool)
    videos = [torch.randn(1, 3, 4, *size, dtype=torch.float64) for size in ((32, 32), (16, 24))]
    apart = []
    for video in videos:
        backbone.zero_grad()
        apart.append(features_and_gradients(backbone, video, mask))
    backbone.zero_grad()
    sum(uneven(backbone(video, mask).values) for video in videos).backward()
    together = {key: parameter.grad for key, parameter in backbone.named_parameters()}
    assert_gradients_close(together, {key: apart[0][key] + apart[1][key] for key in together}, relative=1e-10)


@every_backbone
def test_rewiring_keeps_every_name_and_loads_the_same_weights(name: str) -> None:
    plain, rewired = build(name, rewired=False), build(name, rewired=True)
    assert list(plain.state_dict()) == list(rewired.state_dict())
    assert [key for key, _ in plain.named_parameters()] == [key for key, _ in rewired.named_parameters()]
    with torch.no_grad():
        for parameter in rewired.parameters():
            parameter.add_(1)
    rewired.load_state_dict(plain.state_dict())
    assert all(torch.equal(value, plain.state_dict()[key]) for key, value in rewired.state_dict().items())


@every_backbone
def test_frozen_backbone_never_trains_nor_leaves_evaluation_mode(name: str) -> None:
    model = nn.ModuleDict({"backbone": build(name, frozen=True)})
    model.train()
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(module.training for module in model["backbone"].modules())
    assert model.training


@every_backbone
@both_forms
def test_norm_eval_freezes_norms_and_nothing_else(name: str, rewired: bool) -> None:
    backbone = build(name, rewired=rewired, norm_eval=True)
    backbone.train()
    norms = list(norm_layers(backbone))
    frozen = {id(parameter) for norm in norms for parameter in norm.parameters()}
    assert frozen
    assert not any(norm.training for norm in norms)
    assert all(parameter.requires_grad == (id(parameter) not in frozen) for parameter in backbone.parameters())
    assert backbone.training


def test_unknown_backbone_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown backbone 'swin4d'; known: \[.*'swin3d_tiny'"):
        build_backbone(dataclasses.replace(BackboneConfig(), name="swin4d"))


def assert_weights_are_loaded(name: str, folder: Path, *, rewired: bool) -> None:
    """A file of the network's own names, with values that no initialisation gives."""
    source = build(name, rewired=False)
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(0.5)
    save_file(source.state_dict(), folder / "weights.safetensors")
    loaded = build(name, rewired=rewired, weights=str(folder / "weights.safetensors"))
    for key, parameter in loaded.named_parameters():
        assert torch.equal(parameter, source.get_parameter(key)), key


def drop_path_is_heeded(name: str) -> bool:
    """Whether training gives other features with it than without, from the same weights and the same draws."""
    found = []
    for rate in (0.0, 0.9):
        backbone = build(name, drop_path=rate, rewired=False)
        frames, mask = clip(backbone)
        freeze_norms(backbone.train())  # statistics of batches are not what is asked for
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(2)
            found.append(backbone(frames, mask).values)
    return not torch.equal(*found)


@every_backbone
@both_forms
def test_weights_are_loaded_and_before_the_network_is_rewired(name: str, rewired: bool, tmp_path: Path) -> None:
    assert_weights_are_loaded(name, tmp_path, rewired=rewired)


@every_backbone
def test_drop_path_is_heeded_or_refused(name: str) -> None:
    try:
        heeded = drop_path_is_heeded(name)
    except ValueError as error:
        heeded = "drop_path" in str(error)
    assert heeded


def test_the_contract_catches_a_row_that_ignores_weights_or_drop_path(monkeypatch, tmp_path) -> None:
    nano = BACKBONES["swin3d_nano"]
    monkeypatch.setitem(
        BACKBONES, "swin3d_nano", lambda config: nano(dataclasses.replace(config, weights=None, drop_path=0.0))
    )
    assert not drop_path_is_heeded("swin3d_nano")
    with pytest.raises(AssertionError, match="patch_embed"):
        assert_weights_are_loaded("swin3d_nano", tmp_path, rewired=False)
