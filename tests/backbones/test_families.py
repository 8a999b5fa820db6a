"""Every family of the transformers library: the library's own features when plain, its own branches when rewired."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    CLIPVisionModel,
    Dinov2Model,
    DINOv3ViTModel,
    SiglipVisionModel,
    TimesformerModel,
    VideoMAEForVideoClassification,
    VideoPrismVisionModel,
    ViTModel,
    VivitModel,
    VJEPA2Model,
)
from transformers.models.videomae import modeling_videomae

from re2tal.backbones import BACKBONES, BackboneConfig, build_backbone
from re2tal.backbones.hub.tiling import ClipwiseBackbone
from re2tal.backbones.hub.vjepa2 import grid_positions
from re2tal.rewire import RewiringConfig, residual_branches, rewire, unrewire

# The stock class of each family, and its features of one clip (1, 4, 3, 32, 32), written down from its documentation.
STOCK: dict[str, tuple[Any, Callable[[Any, Tensor], Tensor]]] = {
    "videomae_nano": (
        VideoMAEForVideoClassification,
        lambda model, clip: model.fc_norm(model.videomae(clip).last_hidden_state.reshape(1, 2, 16, 48).mean(2)),
    ),
    "vivit_nano": (VivitModel, lambda model, clip: model(clip).last_hidden_state[:, 1:].reshape(1, 2, 16, 48).mean(2)),
    "vjepa2_nano": (
        VJEPA2Model,
        lambda model, clip: model(clip, skip_predictor=True).last_hidden_state.reshape(1, 2, 16, 48).mean(2),
    ),
    "timesformer_nano": (
        TimesformerModel,
        lambda model, clip: model(clip).last_hidden_state[:, 1:].reshape(1, 16, 4, 48).mean(1),
    ),
    "videoprism_nano": (
        VideoPrismVisionModel,
        lambda model, clip: model(clip).last_hidden_state.reshape(1, 4, 16, 48).mean(2),
    ),
    "vit_nano": (ViTModel, lambda model, clip: model(clip[0]).last_hidden_state[None, :, 0]),
    "dinov2_nano": (Dinov2Model, lambda model, clip: model(clip[0]).last_hidden_state[None, :, 0]),
    "dinov3_nano": (DINOv3ViTModel, lambda model, clip: model(clip[0]).last_hidden_state[None, :, 0]),
    "clip_nano": (CLIPVisionModel, lambda model, clip: model(clip[0]).pooler_output[None]),
    "siglip_nano": (SiglipVisionModel, lambda model, clip: model(clip[0]).pooler_output[None]),
}
every_family = pytest.mark.parametrize("name", STOCK)

PUBLISHED_MILLIONS = {
    "videomae_small": 22,
    "videomae_base": 86,
    "videomae_large": 304,
    "videomae_huge": 632,
    "videomae_giant": 1012,
    "vivit_base": 88.6,
    "vjepa2_large": 304,
    "vjepa2_huge": 632,
    "vjepa2_giant": 1012,
    "timesformer_base": 121.4,
    "videoprism_base": 114,
    "videoprism_large": 354,
    "vit_base": 86,
    "vit_large": 304,
    "dinov2_small": 21.6,
    "dinov2_base": 86,
    "dinov2_large": 304,
    "dinov3_small": 21.6,
    "dinov3_base": 86,
    "dinov3_large": 303,
    "clip_base": 86,
    "clip_large": 303,
    "siglip_base": 93,
    "siglip_large": 316,
}


def build(name: str, **fields: Any) -> ClipwiseBackbone:
    """A backbone whose parameters are all random: several are zero or one by default, which would hide mistakes."""
    torch.manual_seed(0)
    backbone = build_backbone(BackboneConfig(name=name, **fields))
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return backbone


def video(*, num_frames: int = 8, seed: int = 1, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    frames = torch.randn(2, 3, num_frames, 32, 32, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return frames, torch.ones(2, num_frames, dtype=torch.bool)


@every_family
@torch.no_grad()
def test_features_are_those_of_the_stock_model_clip_by_clip_after_saving_and_loading(name: str, tmp_path) -> None:
    backbone = build(name, rewired=False).eval()
    backbone.encoder.model.save_pretrained(tmp_path)
    stock_class, features = STOCK[name]
    stock = stock_class.from_pretrained(tmp_path).eval()
    frames, mask = video()
    clips = frames.transpose(1, 2).split(4, dim=1)
    wanted = [torch.cat([features(stock, clip[[index]]) for clip in clips], dim=1)[0] for index in range(2)]
    torch.testing.assert_close(backbone(frames, mask).values.transpose(1, 2), torch.stack(wanted), rtol=1e-5, atol=1e-5)


@every_family
@torch.no_grad()
def test_a_saved_folder_comes_back_with_every_parameter_and_is_rewired(name: str, tmp_path) -> None:
    source = build(name, rewired=True)
    unrewire(source)
    source.encoder.model.save_pretrained(tmp_path)
    loaded = build_backbone(BackboneConfig(name=name, weights=str(tmp_path)))
    assert list(loaded.state_dict()) == list(source.state_dict())
    assert all(torch.equal(value, source.state_dict()[key]) for key, value in loaded.state_dict().items())
    frames, mask = video()
    rewire(source)
    assert torch.equal(loaded.eval()(frames, mask).values, source.eval()(frames, mask).values)


@every_family
@torch.no_grad()
def test_branches_in_turn_add_up_to_the_block(name: str) -> None:
    backbone = build(name, rewired=False).eval()
    calls: list[tuple[nn.Module, tuple, dict, Any]] = []

    def record(block: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        calls.append((block, args, kwargs, output[0] if isinstance(output, tuple) else output))

    blocks = [module for module in backbone.modules() if residual_branches(module)]
    for block in blocks:
        block.register_forward_hook(record, with_kwargs=True)
    backbone(*video(num_frames=4))
    assert len(calls) == len(blocks) >= 4
    for block, (x, *args), kwargs, output in calls:
        for branch in residual_branches(block):
            x = x + branch.function(block, x, *args, **kwargs)
        torch.testing.assert_close(x, output, rtol=1e-6, atol=1e-6)


@every_family
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)], ids=str)
def test_rewired_gradients_are_those_of_plain_autograd(name: str, dtype: torch.dtype, tolerance: float) -> None:
    drop_path = 0.0 if name.startswith(("clip", "siglip")) else 0.2
    frames, mask = video(dtype=dtype)
    gradients = []
    for recompute in (False, True):
        backbone = build(name, recompute=recompute, drop_path=drop_path).to(dtype).train()
        torch.manual_seed(2)
        values = backbone(frames, mask).values
        (values * torch.linspace(-1, 1, values.numel(), dtype=dtype).view_as(values)).sum().backward()
        gradients.append({key: parameter.grad for key, parameter in backbone.named_parameters()})
    kept, rebuilt = gradients
    # Gradients that are zero but for rounding, such as those of key biases, are compared with the others' scale.
    floor = 1e-3 * max(float(gradient.norm()) for gradient in kept.values())
    for key, gradient in kept.items():
        assert float((rebuilt[key] - gradient).norm()) <= tolerance * max(float(gradient.norm()), floor), key


@every_family
@torch.no_grad()
def test_pairs_of_whole_blocks_extrapolated_are_the_pretrained_network(name: str) -> None:
    plain = build(name, rewired=False).eval()
    faithful = build(name, rewired=True, unit="block", merge="extrapolate", segment=2).eval()
    torch.testing.assert_close(faithful(*video()).values, plain(*video()).values, rtol=1e-5, atol=1e-5)


@every_family
def test_drop_path_acts_in_training_and_renames_nothing(name: str) -> None:
    if name.startswith(("clip", "siglip")):
        with pytest.raises(ValueError, match=f"the blocks of {name} have no place for drop_path 0.5; set it to 0"):
            build(name, drop_path=0.5)
        return
    without, with_drops = build(name), build(name, drop_path=0.5)
    assert list(without.state_dict()) == list(with_drops.state_dict())
    frames, mask = video()
    with torch.no_grad():
        assert torch.equal(without.eval()(frames, mask).values, with_drops.eval()(frames, mask).values)
        assert not torch.equal(with_drops.train()(frames, mask).values, with_drops(frames, mask).values)


def test_every_size_is_a_row_and_has_the_published_number_of_parameters(monkeypatch) -> None:
    # The library fills VideoMAE's position table number by number, which takes seconds and holds no parameter.
    monkeypatch.setattr(modeling_videomae, "get_sinusoid_encoding_table", lambda *shape: torch.zeros(1, *shape))
    modules = ("videomae", "vivit", "vjepa2", "timesformer", "videoprism", "image_towers")
    sizes = [name for module in modules for name in importlib.import_module(f"re2tal.backbones.hub.{module}").SIZES]
    assert {*sizes} == {*PUBLISHED_MILLIONS, *STOCK}
    assert {*sizes} <= {*BACKBONES}
    for name, millions in PUBLISHED_MILLIONS.items():
        with torch.device("meta"):
            backbone = build_backbone(BackboneConfig(name=name, rewired=False))
        count = sum(parameter.numel() for parameter in backbone.parameters())
        assert count == pytest.approx(millions * 1e6, rel=0.02), name


@torch.no_grad()
def test_timesformer_of_another_picture_size_is_the_stock_model_configured_for_it(tmp_path) -> None:
    backbone = build("timesformer_nano", rewired=False).eval()
    backbone.encoder.model.save_pretrained(tmp_path)
    stock = TimesformerModel.from_pretrained(tmp_path).eval()
    frames = torch.randn(1, 3, 4, 48, 48)
    values = backbone(frames, torch.ones(1, 4, dtype=torch.bool)).values
    assert backbone.encoder.model.config.image_size == 32
    stock.config.image_size = 48
    wanted = stock(frames.transpose(1, 2)).last_hidden_state[:, 1:].reshape(1, 36, 4, 48).mean(1)
    torch.testing.assert_close(values.transpose(1, 2), wanted, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_timesformer_resamples_positions_also_where_the_number_of_patches_stays(tmp_path) -> None:
    """16 x 64 pixels have as many patches as 32 x 32, so the stock model takes a table of 4 x 4 as one of 2 x 8."""
    backbone = build("timesformer_nano", rewired=False).eval()
    backbone.encoder.model.save_pretrained(tmp_path)
    stock = TimesformerModel.from_pretrained(tmp_path).eval()
    table = stock.embeddings.position_embeddings.data
    # Nearest: rows 0 and 2, and every column twice.
    wide = table[:, 1:].unflatten(1, (4, 4))[:, [0, 2]][:, :, [0, 0, 1, 1, 2, 2, 3, 3]].flatten(1, 2)
    stock.embeddings.position_embeddings.data = torch.cat([table[:, :1], wide], dim=1)
    stock.config.image_size = 64
    frames = torch.randn(2, 3, 4, 16, 64)
    values = backbone(frames, torch.ones(2, 4, dtype=torch.bool)).values
    wanted = stock(frames.transpose(1, 2)).last_hidden_state[:, 1:].reshape(2, 16, 4, 48).mean(1)
    torch.testing.assert_close(values.transpose(1, 2), wanted, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_timesformer_with_joint_attention_has_two_branches_that_add_up(tmp_path) -> None:
    from transformers import TimesformerConfig

    from re2tal.backbones.hub.timesformer import SIZES, TimesformerEncoder

    config = TimesformerConfig(**SIZES["timesformer_nano"], attention_type="joint_space_time")
    backbone = ClipwiseBackbone(TimesformerEncoder(TimesformerModel(config))).eval()
    plain = backbone(*video()).values
    report = rewire(backbone, config=RewiringConfig(unit="block", merge="extrapolate", segment=2))
    assert report.stages[0].branches == ("attention + mlp",)
    torch.testing.assert_close(backbone(*video()).values, plain, rtol=1e-5, atol=1e-5)


def test_timesformer_over_single_frames_is_refused() -> None:
    from transformers import TimesformerConfig

    from re2tal.backbones.hub.timesformer import SIZES, TimesformerEncoder

    config = TimesformerConfig(**SIZES["timesformer_nano"], attention_type="space_only")
    with pytest.raises(ValueError, match="'space_only' is an image network; use vit_base"):
        TimesformerEncoder(TimesformerModel(config))


@torch.no_grad()
@pytest.mark.parametrize(("size", "num_frames"), [(16, 4), (48, 4), (48, 6)])
def test_vjepa2_of_another_size_is_the_stock_model_configured_for_it(size: int, num_frames: int, tmp_path) -> None:
    backbone = build("vjepa2_nano", rewired=False).eval()
    backbone.encoder.model.save_pretrained(tmp_path)
    config = VJEPA2Model.config_class.from_pretrained(tmp_path)
    config.crop_size, config.frames_per_clip = size, num_frames
    stock = VJEPA2Model.from_pretrained(tmp_path, config=config).eval()
    clips = torch.randn(2, num_frames, 3, size, size)
    wanted = stock(clips, skip_predictor=True).last_hidden_state.unflatten(1, (num_frames // 2, -1)).mean(2)
    torch.testing.assert_close(backbone.encoder(clips), wanted, rtol=1e-5, atol=1e-5)


def test_positions_of_vjepa2_by_hand() -> None:
    positions = grid_positions(2, 1, 3, device=torch.device("cpu"))
    assert positions.tolist() == [[[0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 0], [0, 1, 2, 0, 1, 2]]]


@torch.no_grad()
def test_vjepa2_on_its_side_is_the_network_whose_rows_and_columns_change_places() -> None:
    """Only through its patches and its rotary channels does it know rows from columns; swap both, and the picture."""
    upright, turned = (build("vjepa2_nano", rewired=False).double().eval().encoder for _ in range(2))
    projection = turned.model.encoder.embeddings.patch_embeddings.proj
    projection.weight.copy_(projection.weight.transpose(3, 4).clone())
    for layer in turned.model.encoder.layer:
        attention = layer.attention
        heads = torch.arange(48).view(2, 24)
        width = attention.h_dim
        rows, columns = slice(width, 2 * width), slice(2 * width, 3 * width)
        swapped = heads.clone()
        swapped[:, rows], swapped[:, columns] = heads[:, columns], heads[:, rows]
        for linear in (attention.query, attention.key):
            linear.weight.copy_(linear.weight[swapped.flatten()])
            linear.bias.copy_(linear.bias[swapped.flatten()])
    clips = torch.randn(1, 4, 3, 24, 40, dtype=torch.float64)
    torch.testing.assert_close(turned(clips.transpose(3, 4)), upright(clips))
    assert not torch.allclose(upright(clips.transpose(3, 4)), upright(clips))


def test_the_documented_example_of_a_family_is_its_file_and_short() -> None:
    root = Path(__file__).resolve().parents[2]
    source = (root / "re2tal/backbones/hub/videoprism.py").read_text()
    assert f"```python\n{source}```" in (root / "docs/backbones.md").read_text()
    assert len(source.splitlines()) <= 60
