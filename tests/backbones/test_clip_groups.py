"""Clips encoded in groups: the same features and gradients as all at once, in memory that clips do not add to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from re2tal.backbones import BackboneConfig, build_backbone
from re2tal.backbones.hub.tiling import ClipwiseBackbone
from re2tal.reversible.live_bytes import LiveBytes
from re2tal.training.frames import prepare_frames

FORMS: dict[str, dict[str, Any]] = {
    "rewired": {},
    "in pieces": {"chunk_mebibytes": 0.05},
    "whole blocks": {"unit": "block", "merge": "extrapolate", "segment": 2},
    "checkpointed": {"unit": "block", "beta": 0.0},
    "plain": {"rewired": False},
    "image tower": {"name": "dinov2_nano"},
}
every_form = pytest.mark.parametrize("form", FORMS)


def build(form: str = "rewired", *, dtype: torch.dtype = torch.float64, **fields: Any) -> ClipwiseBackbone:
    torch.manual_seed(0)
    backbone = build_backbone(BackboneConfig(**{"name": "videomae_nano", **FORMS[form], **fields}))
    assert isinstance(backbone, ClipwiseBackbone)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return backbone.to(dtype)


def videos(num_frames: int = 26, *, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Two, the second of which ends in its fourth clip of four frames; the last clip is not full."""
    frames = torch.randn(2, 3, num_frames, 32, 32, generator=torch.Generator().manual_seed(1), dtype=dtype)
    return frames, torch.arange(num_frames) < torch.tensor([[num_frames], [14]])


def uneven(values: Tensor) -> Tensor:
    return (values * torch.linspace(-1, 1, values.numel(), dtype=values.dtype).view_as(values)).sum()


def step(backbone: ClipwiseBackbone, frames: Tensor, mask: Tensor) -> dict[str, Tensor]:
    values = backbone(frames, mask).values
    uneven(values).backward()
    return {"features": values.detach()} | {
        key: parameter.grad for key, parameter in backbone.named_parameters() if parameter.grad is not None
    }


def assert_close(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    scale = max(float(value.norm()) for value in wanted.values())
    for key, value in wanted.items():
        assert float((found[key] - value).norm()) <= 1e-12 * max(float(value.norm()), 1e-3 * scale), key


@every_form
def test_features_and_gradients_are_those_of_all_clips_at_once(form: str) -> None:
    wanted = step(build(form), *videos())
    for clips_at_once in (1, 4, 6):  # groups of 1, 2 and 3 clips of each video, of 7
        assert_close(step(build(form, clips_at_once=clips_at_once), *videos()), wanted)


@pytest.mark.parametrize("clips_at_once", [None, 4])
def test_a_mask_that_is_written_to_before_backward_changes_nothing(clips_at_once) -> None:
    wanted, backbone, (frames, mask) = step(build(), *videos()), build(clips_at_once=clips_at_once), videos()
    values = backbone(frames, mask).values
    mask.fill_(True)
    uneven(values).backward()
    found = {key: parameter.grad for key, parameter in backbone.named_parameters() if parameter.grad is not None}
    assert_close({"features": values.detach()} | found, wanted)


def test_one_group_is_the_ungrouped_network_to_the_bit() -> None:
    wanted, found = (
        step(build(dtype=torch.float32, clips_at_once=clips), *videos(dtype=torch.float32)) for clips in (None, 99)
    )
    assert all(torch.equal(found[key], value) for key, value in wanted.items())


def test_dropped_branches_are_the_same_in_backward_and_the_generator_goes_on_as_without_recomputing() -> None:
    """Against plain autograd over the same groups, which keeps everything."""
    results = []
    for grouped in (True, False):
        backbone = build(drop_path=0.5, clips_at_once=4 if grouped else None, recompute=grouped).train()
        frames, mask = videos(24)
        torch.manual_seed(7)
        if grouped:
            found = step(backbone, frames, mask)
        else:
            # Frames past the end of the second video are its last one.
            frames[1, :, 14:] = frames[1, :, 13:14]
            whole = torch.ones(2, 8, dtype=torch.bool)
            values = torch.cat([backbone(part, whole).values for part in frames.split(8, dim=2)], dim=2)
            uneven(values).backward()
            found = {"features": values.detach()} | {key: one.grad for key, one in backbone.named_parameters()}
        results.append(found | {"generator": torch.get_rng_state().double()})
    assert_close(*results)


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_hooks_see_one_whole_gradient_and_gradients_of_batches_add_up(autocast: bool) -> None:
    backbone = build(dtype=torch.float32, clips_at_once=2)
    seen: dict[str, list[Tensor]] = {}
    accumulated: list[str] = []
    for key, parameter in backbone.named_parameters():
        parameter.register_hook(lambda gradient, key=key: seen.setdefault(key, []).append(gradient.clone()))
        parameter.register_post_accumulate_grad_hook(lambda _, key=key: accumulated.append(key))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        first = {key: value.clone() for key, value in step(backbone, *videos(dtype=torch.float32)).items()}
    for key, parameter in backbone.named_parameters():
        assert len(seen[key]) == 1
        assert torch.equal(seen[key][0], parameter.grad)
    assert sorted(accumulated) == sorted(seen)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        second = step(backbone, *videos(dtype=torch.float32))
    assert all(torch.equal(second[key], 2 * first[key]) for key in seen)


def test_frames_and_the_rest_of_the_network_get_their_gradients() -> None:
    results = []
    for clips_at_once in (None, 4):
        backbone = build(clips_at_once=clips_at_once)
        frames, mask = videos()
        pixels, scale = frames.requires_grad_(), torch.ones(1, dtype=torch.float64, requires_grad=True)
        uneven(backbone(pixels * scale, mask).values * scale).backward()
        results.append({"frames": pixels.grad, "scale": scale.grad})
    assert_close(*results)


def test_frozen_parts_keep_nothing_and_a_frozen_network_no_graph() -> None:
    results = []
    for clips_at_once in (None, 4):
        backbone = build(clips_at_once=clips_at_once)
        backbone.encoder.model.videomae.embeddings.requires_grad_(False)
        results.append(step(backbone, *videos()))
    assert_close(*results)
    frozen = build(clips_at_once=4, frozen=True)
    assert not frozen(*videos()).values.requires_grad


@torch.no_grad()
def test_inference_in_groups() -> None:
    wanted, found = (build(clips_at_once=clips).eval()(*videos()).values for clips in (None, 4))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def prepared(num_frames: int) -> tuple[Tensor, Tensor]:
    """Frames as training gives them, which backward prepares again from their uint8."""
    frames = torch.randint(0, 256, (1, 3, num_frames, 32, 32), dtype=torch.uint8)
    pixels = prepare_frames(frames, strength=0.4, generator=torch.Generator(), dtype=torch.float32)
    return pixels, frames


@pytest.mark.parametrize("rewired", [True, False], ids=["rewired", "plain"])
def test_memory_grows_by_frames_and_features_alone(rewired: bool) -> None:
    """From 20 to 60 groups."""
    peaks = []
    for num_frames in (80, 240):
        backbone = build(dtype=torch.float32, clips_at_once=1, rewired=rewired)
        for _ in range(2):  # the first step keeps samples of states, to compare them
            pixels, frames = prepared(num_frames)
            mask = torch.ones(1, num_frames, dtype=torch.bool)
            backbone.zero_grad()
            with LiveBytes() as live:
                values = backbone(pixels, mask).values
                del pixels
                uneven(values).backward()
        assert frames.dtype == torch.uint8
        peaks.append(live.peak)
    features, pixels_bytes = 4 * 48 * 160 // 2, 4 * 3 * 32 * 32 * 160
    # Frames are prepared once more in backward; features have a gradient, and the loss its weights and product.
    assert peaks[1] - peaks[0] <= pixels_bytes + 8 * features


def test_writing_to_frames_before_backward_is_noticed() -> None:
    frames, mask = videos()
    value = uneven(build(clips_at_once=4)(frames, mask).values)
    frames.mul_(2)
    with pytest.raises(RuntimeError, match="somebody has written to them, or to the frames of the batch"):
        value.backward()


@pytest.mark.parametrize("form", ["plain", "rewired"])
def test_backward_finds_modes_and_weights_of_forward_or_says_so(form: str) -> None:
    found = []
    for evaluated in (False, True):
        backbone = build(form, drop_path=0.5, clips_at_once=4).train()
        torch.manual_seed(3)
        value = uneven(backbone(*videos()).values)
        backbone.train(not evaluated)
        value.backward()
        assert all(module.training != evaluated for module in backbone.modules())
        found.append({key: one.grad for key, one in backbone.named_parameters() if one.grad is not None})
    assert_close(*found)
    value = uneven(backbone(*videos()).values)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.mul_(1.1)
    with pytest.raises(RuntimeError, match=r"has changed between forward and backward .* written to in place"):
        value.backward()


def test_statistics_of_a_batch_cannot_be_those_of_a_group() -> None:
    backbone = build(clips_at_once=4).train()
    backbone.encoder.norm = torch.nn.BatchNorm1d(3)
    with pytest.raises(ValueError, match="a BatchNorm takes its statistics from all clips of a batch"):
        backbone(*videos())
    backbone.eval()(*videos())


def test_a_buffer_that_each_group_writes_is_refused() -> None:
    # Spectral norm takes a step of its power iteration at each call, so backward would encode with other weights.
    backbone = build("plain", clips_at_once=4).train()
    linear = next(module for module in backbone.modules() if isinstance(module, torch.nn.Linear))
    torch.nn.utils.parametrizations.spectral_norm(linear)
    with pytest.raises(ValueError, match=r"each group writes .*_u, a buffer, which all clips at once write once"):
        backbone(*videos())
    backbone.eval()(*videos())


def test_a_buffer_that_each_group_exchanges_is_refused_and_a_table_is_not() -> None:
    def average(layer: torch.nn.Module, args: tuple, output: torch.Tensor) -> None:
        layer.mean = 0.9 * layer.mean + 0.1 * output.detach().mean()

    def tabulate(layer: torch.nn.Module, args: tuple, output: torch.Tensor) -> None:
        layer.mean = layer.mean if layer.mean.ndim else output.detach().new_zeros(3)

    backbone = build("plain", clips_at_once=4).train()
    linear = next(module for module in backbone.modules() if isinstance(module, torch.nn.Linear))
    linear.register_buffer("mean", torch.zeros(()))
    linear.register_forward_hook(tabulate)
    backbone(*videos())
    linear.register_forward_hook(average)
    with pytest.raises(ValueError, match=r"each group writes .*mean, a buffer, which all clips at once write once"):
        backbone(*videos())


def test_what_has_no_gradient_in_groups_is_an_error() -> None:
    backbone = build(clips_at_once=4)
    frames, mask = videos()
    value = uneven(backbone(frames.requires_grad_(), mask).values)
    with pytest.raises(RuntimeError, match="gradients of chosen tensors were asked for"):
        torch.autograd.grad(value, [frames])
    with pytest.raises(RuntimeError, match="have no second derivatives"):
        uneven(backbone(*videos()).values).backward(create_graph=True)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "swin3d_nano"}, "but swin3d_nano takes a video as one clip"),
        ({"adapter": "temporal"}, "the adapters of this backbone convolve over all clips"),
        ({"clips_at_once": 0}, r"backbone\.clips_at_once is 0; give at least 1, or None"),
    ],
)
def test_what_cannot_be_grouped_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_backbone(BackboneConfig(**{"name": "videomae_nano", "clips_at_once": 2, **fields}))
