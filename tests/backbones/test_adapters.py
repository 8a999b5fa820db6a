"""Adapters in rewired blocks: their gradients are plain autograd's, what they cross, and that nothing else trains."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from re2tal.backbones import BackboneConfig, build_backbone
from re2tal.backbones.adapters.temporal import TemporalAdapter, by_positions
from re2tal.rewire import RewiredStage, count_states

TEMPORAL: dict[str, Any] = {"name": "videomae_nano", "adapter": "temporal"}
LORA: dict[str, Any] = {"name": "videomae_nano", "adapter": "lora", "lora_rank": 2}
# Attention with a learned bias over windows, and one with rotary positions.
LORA_ELSEWHERE: list[dict[str, Any]] = [
    {"name": "swin3d_nano", "adapter": "lora", "lora_rank": 2, "lora_targets": ("qkv", "proj", "fc1", "fc2")},
    {"name": "vjepa2_nano", "adapter": "lora", "lora_rank": 2, "lora_targets": ("query", "key", "proj", "fc2")},
]
KINDS = [TEMPORAL, TEMPORAL | {"adapter_blocks": (1, 3)}, LORA, *LORA_ELSEWHERE]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=["temporal", "temporal in some", "lora", "swin", "vjepa2"])


def build(kind: dict[str, Any], **fields: Any) -> Any:
    """In float64; all parameters random, because adapters start as zero."""
    if kind["adapter"] == "lora":
        pytest.importorskip("peft")
    torch.manual_seed(0)
    backbone = build_backbone(BackboneConfig(**kind, **fields)).double()
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return backbone


def video(size: int = 32) -> tuple[Tensor, Tensor]:
    frames = torch.randn(2, 3, 12, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return frames, torch.ones(2, 12, dtype=torch.bool)


def step(backbone: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Features, and the gradients of their weighted sum."""
    values = backbone(*video()).values
    weights = torch.randn(values.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (values * weights).sum().backward()
    return values.detach(), {name: one.grad for name, one in backbone.named_parameters() if one.grad is not None}


def check(found: tuple[Tensor, dict[str, Tensor]], wanted: tuple[Tensor, dict[str, Tensor]]) -> None:
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-11, atol=1e-11)
    assert found[1].keys() == wanted[1].keys()
    largest = max(float(gradient.abs().max()) for gradient in wanted[1].values())
    for name, gradient in wanted[1].items():
        assert float((found[1][name] - gradient).abs().max()) <= 1e-11 * largest, name


@every_kind
@pytest.mark.parametrize("unit", ["branch", "block"])
def test_rebuilt_gradients_are_those_of_plain_autograd(kind: dict[str, Any], unit: str) -> None:
    wanted = step(build(kind, recompute=False, unit=unit))
    assert all(".adapter." in name or ".lora_" in name for name in wanted[1])
    assert all(gradient.abs().max() > 0 for gradient in wanted[1].values())
    check(step(build(kind, unit=unit)), wanted)
    if unit == "branch":
        check(step(build(kind, chunk_mebibytes=0.05)), wanted)


@every_kind
def test_at_beta_0_it_is_the_network_before_rewiring(kind: dict[str, Any]) -> None:
    check(step(build(kind, beta=0.0)), step(build(kind, rewired=False)))


def test_blocks_below_the_first_adapter_keep_nothing_at_beta_0() -> None:
    kind = TEMPORAL | {"adapter_blocks": (2, 3)}
    adapted = build(kind, beta=0.0)
    # Of 4 blocks with 2 branches, and 2 adapters, the upper half keeps the inputs of its branches.
    assert count_states(build(TEMPORAL | {"adapter_blocks": (0, 2, 3)}, beta=0.0)).kept == 4 * 2 + 3
    assert count_states(adapted).kept == 2 * 3
    starts: list[int] = []

    def watch(state: Tensor) -> Tensor:
        starts.append(state.numel())
        return state

    with torch.autograd.graph.saved_tensors_hooks(watch, lambda state: state):
        adapted(*video())
    tokens = 2 * 3 * 2 * 16 * 48
    assert sum(size == tokens for size in starts) == 2 * 3
    check(step(adapted), step(build(kind, rewired=False)))


@every_kind
def test_only_adapters_train(kind: dict[str, Any]) -> None:
    backbone = build(kind, drop_path=0.1)
    trained = {name for name, parameter in backbone.named_parameters() if parameter.requires_grad}
    assert trained == set(step(build(kind, recompute=False))[1])
    assert any(stage.training for stage in backbone.modules() if isinstance(stage, RewiredStage))


def test_a_new_adapter_leaves_the_features_as_they_are() -> None:
    torch.manual_seed(0)
    plain = build_backbone(BackboneConfig(name="videomae_nano", rewired=False)).eval()
    adapted = build_backbone(BackboneConfig(**TEMPORAL, rewired=False)).eval()
    missing, unexpected = adapted.load_state_dict(plain.state_dict(), strict=False)
    assert all(".adapter." in name for name in missing)
    assert not unexpected
    plain.encoder.model.fc_norm = None  # AdaTAD's features end without it
    frames, mask = video()
    with torch.no_grad():
        assert torch.equal(adapted(frames.float(), mask).values, plain(frames.float(), mask).values)


def test_a_file_has_all_adapters_or_none(tmp_path) -> None:
    state = build_backbone(BackboneConfig(**TEMPORAL, rewired=False)).state_dict()
    plain = {name: value for name, value in state.items() if ".adapter." not in name}
    some = {name: value for name, value in state.items() if ".adapter." not in name or ".layer.1." in name}
    save_file(plain, tmp_path / "plain.safetensors")
    save_file(some, tmp_path / "some.safetensors")
    build_backbone(BackboneConfig(**TEMPORAL, weights=str(tmp_path / "plain.safetensors")))
    with pytest.raises(ValueError, match=r"27 missing: encoder\.model\.videomae\.encoder\.layer\.0\.adapter\.gamma"):
        build_backbone(BackboneConfig(**TEMPORAL, weights=str(tmp_path / "some.safetensors")))


def test_time_is_that_of_the_window_and_ends_with_the_video() -> None:
    """By its equation: three taps over time for one position of one video, zeros outside."""
    torch.manual_seed(0)
    adapter = TemporalAdapter(6, hidden=4, steps=2).double()
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(2, 3, 2, 5, 6, dtype=torch.float64)  # videos, clips, steps, positions, channels
    found = adapter(x.reshape(6, 10, 6), clips_per_video=3).reshape(2, 6, 5, 6)
    z = torch.nn.functional.gelu(adapter.down_proj(x.reshape(2, 6, 5, 6)))
    taps = adapter.dwconv.weight[:, 0]
    for video_index in range(2):
        for position in range(5):
            line = z[video_index, :, position]
            around = torch.cat([torch.zeros_like(line[:1]), line, torch.zeros_like(line[:1])])
            mixed = sum(around[tap : tap + 6] * taps[:, tap] for tap in range(3)) + adapter.dwconv.bias
            inner = line + mixed @ adapter.conv.weight[:, :, 0].T + adapter.conv.bias
            torch.testing.assert_close(found[video_index, :, position], adapter.gamma * adapter.up_proj(inner))


def test_its_pieces_are_positions_of_all_clips() -> None:
    block = torch.nn.Module()
    block.adapter = TemporalAdapter(6, hidden=4, steps=2)
    parts = by_positions(4).parts(block, torch.Size([6, 10, 6]), 2)
    assert [(part.axis, part.spans) for part in parts] == [(1, ((0, 2), (5, 7))), (1, ((2, 5), (7, 10)))]
    x = torch.randn(6, 10, 6)
    torch.nn.init.normal_(block.adapter.up_proj.weight)
    whole = block.adapter(x, clips_per_video=3)
    for part in parts:
        piece = torch.cat([x[:, start:stop] for start, stop in part.spans], dim=1)
        wanted = torch.cat([whole[:, start:stop] for start, stop in part.spans], dim=1)
        torch.testing.assert_close(block.adapter(piece, clips_per_video=3), wanted)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"adapter": "tia"}, r"backbone\.adapter is 'tia'; known: \['none', 'temporal', 'lora'\]"),
        ({"adapter": "temporal", "frozen": True}, "leave frozen out"),
        ({"adapter_ratio": 0.5}, r"backbone\.adapter_ratio is 0\.5, but backbone\.adapter is 'none'; set it to 'tempo"),
        ({"adapter": "temporal", "lora_rank": 4}, r"backbone\.lora_rank is 4, but backbone\.adapter is 'temporal'"),
        ({"adapter": "temporal", "adapter_ratio": 0.0}, r"adapter_ratio is 0\.0; give a share above 0"),
        ({"adapter": "lora", "lora_rank": 0}, r"lora_rank is 0 and lora_alpha 16\.0; give a rank of at least 1"),
        ({"adapter": "temporal", "adapter_blocks": (4,)}, r"adapter_blocks is \(4,\); this network has blocks 0 to 3"),
        ({"adapter": "temporal", "adapter_blocks": ()}, r"adapter_blocks is \(\); this network has blocks 0 to 3"),
        ({"adapter": "temporal", "adapter_ratio": 0.01}, r"adapter_ratio is 0\.01, which leaves nothing of 48"),
        ({"adapter": "temporal", "name": "swin3d_nano"}, "'temporal', and swin3d_nano has no place for it"),
    ],
)
def test_what_does_not_go_together_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_backbone(BackboneConfig(**({"name": "videomae_nano"} | fields)))


def test_without_the_library_it_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)  # as if it were not there
    with pytest.raises(ValueError, match=r'needs the peft package; install it: pip install "re2tal\[lora\]"'):
        build_backbone(BackboneConfig(**LORA))


def test_unknown_targets_are_answered_with_the_known_ones() -> None:
    pytest.importorskip("peft")
    with pytest.raises(
        ValueError, match=r"lora_targets names qkv, and .* videomae_nano are called dense, key, query, v"
    ):
        build_backbone(BackboneConfig(**LORA, lora_targets=("qkv",)))


@pytest.mark.parametrize(
    ("name", "target", "others"),
    [
        ("swin3d_nano", "proj", {"patch_embed.proj"}),  # a convolution
        ("siglip_nano", "out_proj", {"encoder.model.head.attention.out_proj"}),  # torch's attention never calls it
    ],
)
def test_only_linear_layers_that_are_called_have_updates(name: str, target: str, others: set[str]) -> None:
    pytest.importorskip("peft")
    plain = build_backbone(BackboneConfig(name=name))
    backbone = build_backbone(BackboneConfig(name=name, adapter="lora", lora_rank=2, lora_targets=(target,)))
    updated = {key.partition(".lora_")[0] for key in dict(backbone.named_parameters()) if ".lora_" in key}
    called = {key for key, _ in plain.named_modules() if key.endswith(f".{target}")}
    assert updated
    assert updated == called - others


@pytest.mark.parametrize("kind", [LORA, *LORA_ELSEWHERE], ids=["videomae", "swin", "vjepa2"])
def test_merged_updates_are_the_same_network_under_its_own_names(kind: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft")
    from re2tal.backbones.adapters.lora import merge_lora

    backbone = build(kind).eval()
    with torch.no_grad():
        wanted = backbone(*video()).values
        merge_lora(backbone)
        torch.testing.assert_close(backbone(*video()).values, wanted, rtol=1e-11, atol=1e-11)
    assert not any(isinstance(module, peft.tuners.lora.LoraLayer) for module in backbone.modules())
    plain = build_backbone(BackboneConfig(name=kind["name"])).double()
    plain.load_state_dict(backbone.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(plain.eval()(*video()).values, wanted, rtol=1e-11, atol=1e-11)
