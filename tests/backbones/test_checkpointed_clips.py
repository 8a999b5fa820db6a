"""Clip-wise backbones that were rewired to recompute keep the frames of a video, and no copy of them cut into clips."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from re2tal.backbones import BACKBONES, BackboneConfig, build_backbone
from re2tal.backbones.hub.tiling import ClipwiseBackbone
from re2tal.reversible.live_bytes import LiveBytes
from re2tal.rewire import unrewire

# Rows of a family share every line of code but that image towers differ in their models, so all small ones are tried.
FAMILIES = sorted(name for name in BACKBONES if name.endswith("_nano") and not name.startswith(("swin3d", "slowfast")))
FRAMES = 6
CLIPS_BYTES = 4 * 2 * 3 * 32 * 32
"""Of a frame of both videos."""

every_family = pytest.mark.parametrize("name", FAMILIES)


def build(name: str, *, checkpointing: bool = True, drop_path: float = 0.0) -> ClipwiseBackbone:
    """Rebuilds its runs in any case; `checkpointing` is whether it does so with clips."""
    torch.manual_seed(0)
    backbone = build_backbone(BackboneConfig(name=name, drop_path=drop_path))
    assert isinstance(backbone, ClipwiseBackbone)
    assert backbone.checkpointing
    backbone.checkpointing = checkpointing
    return backbone


def videos(seed: int = 1) -> tuple[Tensor, Tensor]:
    """Two, the second of which ends before the last of its clips."""
    frames = torch.randn(2, 3, FRAMES, 32, 32, generator=torch.Generator().manual_seed(seed))
    return frames, torch.arange(FRAMES) < torch.tensor([[FRAMES], [3]])


def loss(backbone: ClipwiseBackbone, frames: Tensor, mask: Tensor) -> Tensor:
    values = backbone(frames, mask).values.float()
    return (values * torch.linspace(-1, 1, values.numel()).view_as(values)).sum()


def gradients(backbone: ClipwiseBackbone) -> dict[str, Tensor]:
    return {key: parameter.grad for key, parameter in backbone.named_parameters() if parameter.grad is not None}


def assert_same_bits(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert [key for key, value in wanted.items() if not torch.equal(found[key], value)] == []


@every_family
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_features_and_gradients_are_the_same_bits_and_the_copy_is_gone(name: str, autocast: bool) -> None:
    alive, results = [], []
    for checkpointing in (False, True):
        backbone, (frames, mask) = build(name, checkpointing=checkpointing), videos()
        # DINOv3 makes a table on its first call. The first step of all keeps samples of states, to compare them.
        loss(backbone, frames, mask).backward()
        backbone.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), LiveBytes() as live:
            value = loss(backbone, frames, mask)
        alive.append(live.live)
        value.backward()
        results.append({"loss": value.detach()} | gradients(backbone))
    assert_same_bits(*results)
    length = backbone.encoder.clip_frames
    copied = -(-FRAMES // length) * length * CLIPS_BYTES
    # The mask is copied instead, so that backward cuts clips as forward did.
    assert alive[0] - alive[1] == copied // (2 if autocast else 1) - mask.nbytes


def test_random_draws_are_the_same_and_the_global_generator_is_left_alike() -> None:
    results = []
    for checkpointing in (False, True):
        backbone = build("videomae_nano", checkpointing=checkpointing, drop_path=0.5).train()
        torch.manual_seed(3)
        loss(backbone, *videos()).backward()
        results.append(gradients(backbone) | {"generator": torch.get_rng_state()})
    assert_same_bits(*results)


def test_gradients_of_several_batches_add_up_in_any_order() -> None:
    results = []
    for checkpointing in (False, True):
        backbone = build("videomae_nano", checkpointing=checkpointing)
        losses = [loss(backbone, *videos(seed)) for seed in (1, 2, 3)]
        for each in losses:
            each.backward()
        results.append(gradients(backbone))
    assert_same_bits(*results)


def test_a_frozen_stem_keeps_neither_clips_nor_frames() -> None:
    results = []
    for checkpointing in (False, True):
        backbone, (frames, mask) = build("videomae_nano", checkpointing=checkpointing), videos()
        backbone.encoder.model.videomae.embeddings.requires_grad_(False)
        value = loss(backbone, frames, mask)
        frames.fill_(torch.nan)  # nobody looks at them again, and nobody minds
        value.backward()
        results.append(gradients(backbone))
    assert_same_bits(*results)
    assert results[0]


def test_frames_get_the_same_gradient_of_their_own() -> None:
    results = []
    for checkpointing in (False, True):
        backbone, (frames, mask) = build("videomae_nano", checkpointing=checkpointing), videos()
        loss(backbone, frames.requires_grad_(), mask).backward()
        results.append({"frames": frames.grad})
    assert_same_bits(*results)


def test_frames_that_are_written_to_before_backward_are_noticed() -> None:
    frames, mask = videos()
    value = loss(build("videomae_nano"), frames, mask)
    frames.mul_(2)
    with pytest.raises(RuntimeError, match="somebody has written to them, or to the frames of the batch"):
        value.backward()


@pytest.mark.parametrize("form", ["plain", "unrewired", "keeps activations"])
def test_other_networks_keep_their_clips(form: str) -> None:
    rewired, recompute = form != "plain", form != "keeps activations"
    backbone = build_backbone(BackboneConfig(name="videomae_nano", rewired=rewired, recompute=recompute))
    if form == "unrewired":
        unrewire(backbone)
    frames, mask = videos()
    value = loss(backbone, frames, mask)
    frames.fill_(torch.nan)
    value.backward()
    assert all(torch.isfinite(gradient).all() for gradient in gradients(backbone).values())
