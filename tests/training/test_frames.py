"""Prepared frames: not kept from forward to backward by a rewired network, and prepared again to the same bits."""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu

from re2tal.backbones import BackboneConfig, build_backbone
from re2tal.data.streaming.transforms import draw_colours, recolour
from re2tal.distributed import resolve_world
from re2tal.reversible.live_bytes import LiveBytes
from re2tal.training.config import DTYPES, EngineConfig
from re2tal.training.engine import build_engine
from re2tal.training.engine_weights import gather_weights
from re2tal.training.frames import prepare_frames
from re2tal.training.optimizer import OptimizerConfig, build_optimizer
from re2tal.training.process_group import join
from re2tal.training.zero_file import resolve_deepspeed_config

FAMILIES = ["swin3d_nano", "slowfast_nano", "videomae_nano"]
SHAPE = (2, 3, 8, 32, 32)
MASK = torch.ones(2, 8, dtype=torch.bool)
Prepare = Callable[..., Tensor]


def batch(seed: int = 0) -> Tensor:
    return torch.randint(0, 256, SHAPE, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def prepared(frames: Tensor, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return prepare_frames(frames, strength=0.4, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def without_origin(frames: Tensor, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    colours = draw_colours(frames, strength=0.4, generator=torch.Generator().manual_seed(seed))
    return recolour(frames, *colours, dtype=dtype)


def network(name: str, *, dtype: torch.dtype = torch.float32, recompute: bool = True) -> nn.Module:
    torch.manual_seed(0)
    return build_backbone(BackboneConfig(name=name, recompute=recompute)).to(dtype).train()


def gradients(
    name: str, prepare: Prepare, *, dtype: torch.dtype = torch.float32, around: Callable[[], AbstractContextManager]
) -> list[Tensor]:
    """Added up over two batches."""
    net = network(name, dtype=dtype)
    torch.manual_seed(1)
    for seed in range(2):
        frames = batch(seed)
        with around():
            loss = net(prepare(frames, dtype=dtype, seed=seed), MASK).values.float().square().mean()
        loss.backward()
    return [parameter.grad for parameter in net.parameters()]


@pytest.mark.parametrize(
    ("dtype", "around"),
    [
        (torch.float32, nullcontext),
        (torch.bfloat16, nullcontext),
        (torch.float32, partial(torch.autocast, "cpu", torch.bfloat16)),
        (torch.float32, save_on_cpu),
    ],
    ids=["float32", "bfloat16", "autocast", "saved elsewhere"],
)
@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_are_the_same_bits_as_of_frames_that_are_kept(name, dtype, around) -> None:
    found, wanted = (gradients(name, prepare, dtype=dtype, around=around) for prepare in (prepared, without_origin))
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
    assert all(gradient.any() for gradient in found)


def bytes_less(name: str, *, recompute: bool = True) -> int:
    """How much less there is between forward and backward when the frames can be prepared again."""
    live = []
    for prepare in (prepared, without_origin):
        net, frames = network(name, recompute=recompute), batch()
        with LiveBytes() as counted:
            loss = net(prepare(frames), MASK).values.square().mean()
            live.append(counted.live)
        loss.backward()
    return live[1] - live[0]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_rewired_network_keeps_no_prepared_frames(name) -> None:
    pixels = 4 * batch().numel()
    # The few numbers that colours are made of are kept instead.
    assert pixels - 1000 < bytes_less(name) <= pixels


def test_a_plain_network_keeps_them() -> None:
    assert abs(bytes_less("swin3d_nano", recompute=False)) < 1000


@pytest.mark.parametrize("name", FAMILIES)
def test_writing_to_the_batch_before_backward_is_noticed(name) -> None:
    frames = batch()
    loss = network(name)(prepared(frames), MASK).values.square().mean()
    frames.zero_()
    with pytest.raises(RuntimeError, match="frames of the batch"):
        loss.backward()


def test_frames_that_were_written_to_are_kept_as_they_are() -> None:
    found = []
    for prepare in (prepared, without_origin):
        net, frames = network("swin3d_nano"), batch()
        pixels = prepare(frames).mul_(0.5)
        net(pixels, MASK).values.square().mean().backward()
        found.append(net.patch_embed.proj.weight.grad)
    assert torch.equal(*found)


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (2, "bf16"), (3, "bf16")])
def test_an_engine_keeps_none_either(stage, precision, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("torch.nn.functional.linear", torch.nn.functional.linear)  # ZeRO-3 replaces it for good
    config = EngineConfig(batch_size=2, precision=precision, timeout_minutes=1)
    join(resolve_world(os.environ), config)
    ds = tmp_path / "ds.json"
    ds.write_text(json.dumps({"zero_optimization": {"stage": stage}, "bf16": {"enabled": "auto"}}))
    net = network("swin3d_nano")
    settings = resolve_deepspeed_config(ds, config, world_size=1)
    engine = build_engine(net, build_optimizer(net, OptimizerConfig()), factor=lambda step: 1.0, settings=settings)
    frames, before = batch(), gather_weights(engine)
    pixels = prepared(frames, dtype=DTYPES[precision])
    storage = weakref.ref(pixels.untyped_storage())
    loss = engine(pixels, MASK).values.float().square().mean()
    del pixels
    assert storage() is None
    engine.backward(loss)
    engine.step()
    assert not torch.equal(gather_weights(engine)["patch_embed.proj.weight"], before["patch_embed.proj.weight"])


def test_nothing_but_the_network_holds_the_batch() -> None:
    frames = batch()
    storage = weakref.ref(frames.untyped_storage())
    loss = network("swin3d_nano")(prepared(frames), MASK).values.square().mean()
    del frames
    assert storage() is not None
    loss.backward()
    del loss
    assert storage() is None
