"""Blocks of the transformers library, tiny and random: discovered without registration, they are the same network."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

import pytest
import torch
import transformers
from torch import Tensor, nn

from re2tal.rewire import RewiringConfig, rewire, unrewire
from re2tal.rewire.branches import Residual, registered
from re2tal.rewire.discover import record_calls, take_apart

TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
IMAGE = {**TINY, "image_size": 32, "patch_size": 16}
CLIP = {**IMAGE, "num_frames": 4}
JEPA = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "crop_size": 32, "frames_per_clip": 4}
PRISM = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 32, "num_frames": 4}
PRISM |= {"num_spatial_layers": 2, "num_temporal_layers": 2, "tubelet_size": (1, 16, 16)}
CONV = {"hidden_sizes": [8, 16], "depths": [2, 2], "num_stages": 2}
SWIN = {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 2], "window_size": 4}
SEGFORMER = {
    "num_encoder_blocks": 2,
    "depths": [2, 2],
    "hidden_sizes": [8, 16],
    "num_attention_heads": [1, 2],
    "sr_ratios": [2, 1],
    "patch_sizes": [7, 3],
    "strides": [4, 2],
    "mlp_ratios": [2, 2],
}


def video(config: dict) -> Tensor:
    return torch.randn(1, 4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def image(config: dict) -> Tensor:
    return video(config)[:, 0]


FAMILIES: dict[str, tuple[str, dict, Callable[[dict], Tensor]]] = {
    "VideoMAE": ("VideoMAE", CLIP, video),
    "Vivit": ("Vivit", {**CLIP, "tubelet_size": [2, 16, 16]}, video),
    "VJEPA2": ("VJEPA2", {**JEPA, "pred_hidden_size": 24, "pred_num_attention_heads": 2}, video),
    "Timesformer": ("Timesformer", CLIP, video),
    "VideoPrismVision": ("VideoPrismVision", PRISM, video),
    "ViT": ("ViT", IMAGE, image),
    "Timesformer joint": ("Timesformer", {**CLIP, "attention_type": "joint_space_time"}, video),
    "Dinov2": ("Dinov2", IMAGE, image),
    "DINOv3ViT": ("DINOv3ViT", IMAGE, image),
    "CLIPVision": ("CLIPVision", IMAGE, image),
    "SiglipVision": ("SiglipVision", IMAGE, image),
    "Beit": ("Beit", {**IMAGE, "use_relative_position_bias": True}, image),
    "IJepa": ("IJepa", IMAGE, image),
    "ConvNext": ("ConvNext", CONV, image),
    "Swin": ("Swin", SWIN, image),
    "Segformer": ("Segformer", SEGFORMER, image),
    "PoolFormer": ("PoolFormer", {"hidden_sizes": [8, 16, 24, 32], "depths": [2, 2, 2, 2]}, image),
}
REGISTERED_IN = {
    "VideoMAE": "videomae",
    "Vivit": "vivit",
    "VJEPA2": "vjepa2",
    "Timesformer": "timesformer",
    "VideoPrismVision": "videoprism",
    "ViT": "image_towers",
    "Timesformer joint": "timesformer",
    "Dinov2": "image_towers",
    "DINOv3ViT": "image_towers",
    "CLIPVision": "image_towers",
    "SiglipVision": "image_towers",
}


def build(family: str) -> tuple[nn.Module, Tensor]:
    name, config, example = FAMILIES[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**config))
    return net.eval(), example(config)


@pytest.mark.parametrize("family", FAMILIES)
def test_segments_of_one_block_are_the_network(family) -> None:
    """Registered or not; which also shows that the network only hands the hidden state on."""
    net, x = build(family)
    with torch.no_grad():
        wanted = net(x).last_hidden_state
        report = rewire(net, example=(x,), config=RewiringConfig(unit="block", merge="extrapolate", segment=1))
        rewired = net(x).last_hidden_state
        unrewire(net)
        assert torch.equal(net(x).last_hidden_state, wanted)
    assert sum(stage.rewired_blocks for stage in report.stages) >= 2, str(report)
    assert all(not stage.left_alone for stage in report.stages if stage.rewired_blocks), str(report)
    torch.testing.assert_close(rewired, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", REGISTERED_IN)
def test_discovered_branches_are_the_registered_ones(family) -> None:
    """Of every family of the transformers library in BACKBONES."""
    import_module(f"re2tal.backbones.hub.{REGISTERED_IN[family]}")
    net, x = build(family)
    blocks = [module for module in net.modules() if isinstance(registered(module), Residual)]
    calls = record_calls(net, blocks, example=(x,))
    assert len(calls) >= 2
    for block, call in calls.items():
        discovered = take_apart(block, call)
        assert isinstance(discovered, Residual), discovered
        wanted = registered(block)
        assert len(discovered.branches) == len(wanted.branches)
        state = call.x
        with torch.no_grad():
            for mine, its in zip(discovered.branches, wanted.branches, strict=True):
                values = [branch.function(block, state, *call.args, **call.kwargs) for branch in (mine, its)]
                torch.testing.assert_close(*values, rtol=1e-5, atol=1e-6)
                state = state + values[0]
