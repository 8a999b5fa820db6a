"""Every family run in pieces computes what it computes whole."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from reversible.test_memory import LiveBytes
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from re2tal.backbones import BACKBONES, BackboneConfig, build_backbone
from re2tal.backbones.hub.tiling import ClipwiseBackbone
from re2tal.backbones.swin3d.network import SIZES, SwinBlock, VideoSwin
from re2tal.backbones.swin3d.shifted_windows import clip_window, row_spans
from re2tal.reversible import chunking
from re2tal.rewire import RewiringConfig, residual_branches, rewire

FAMILIES = sorted({build: name for name, build in reversed(BACKBONES.items())}.values())
TINY = 1e-4  # mebibytes, so that everything is cut as far as it can be


def results(backbone: nn.Module, *, autocast: bool = False) -> list[Tensor]:
    """Features, then the gradients of all parameters."""
    shape = (2, 3, 5, 32, 32) if isinstance(backbone, ClipwiseBackbone) else (2, 3, 21, 45, 41)
    frames = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    frames = frames.to(next(backbone.parameters()).dtype)
    torch.manual_seed(2)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        values = backbone(frames, torch.ones(2, shape[2], dtype=torch.bool)).values
    (values * torch.linspace(-1, 1, values.numel()).view_as(values)).sum().backward()
    return [values.detach(), *(p.grad for p in backbone.parameters() if p.grad is not None)]


def assert_near(found: list[Tensor], wanted: list[Tensor], *, relative: float) -> None:
    """Some gradients, of key biases, are zero but for rounding: errors count against the largest of all."""
    largest = max(float(value.abs().max()) for value in wanted)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=relative, atol=relative * largest)


@pytest.fixture
def num_pieces(monkeypatch) -> list[int]:
    """Into how many pieces branches were cut, call by call."""
    counted: list[int] = []

    class Counting(chunking.GradientSums):
        def collect(self, *args):
            counted.append(1)
            super().collect(*args)

    monkeypatch.setattr("re2tal.reversible.differentiation.GradientSums", Counting)
    return counted


@pytest.mark.parametrize("name", FAMILIES)
def test_pieces_change_neither_features_nor_gradients(name: str, num_pieces: list[int]) -> None:
    found = []
    for chunk_mebibytes in (None, TINY):
        torch.manual_seed(0)
        config = BackboneConfig(name=name, chunk_mebibytes=chunk_mebibytes, norm_eval=name.startswith("slowfast"))
        found.append(results(build_backbone(config).double()))
        assert bool(num_pieces) == (chunk_mebibytes is not None)
    assert_near(found[1], found[0], relative=1e-12)


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("window", [(2, 3, 3), (8, 7, 7), (4, 2, 5), (3, 16, 2)])
def test_rows_of_windows_with_drop_path_padding_and_every_kind_of_shift(window, recompute, num_pieces) -> None:
    """Drop-path too: a clip is dropped in all pieces or in none, and the same ones are as without pieces."""
    found = []
    for chunk_mebibytes in (None, TINY):
        torch.manual_seed(0)
        swin = VideoSwin(embed_dim=8, depths=(2, 3), num_heads=(2, 2), window=window, drop_path=0.5).double()
        rewire(swin, config=RewiringConfig(chunk_mebibytes=chunk_mebibytes, recompute=recompute))
        found.append([*results(swin), torch.rand(3)])
    assert bool(num_pieces) == recompute
    assert_near(found[1], found[0], relative=1e-12)


@pytest.mark.parametrize("size", list(product((1, 5, 8, 13), (6, 7), (6, 9))))
@pytest.mark.parametrize("num", [1, 2, 64])
@pytest.mark.parametrize("shift", [(0, 0, 0), (2, 3, 1)])
def test_a_branch_on_parts_is_the_branch_on_the_whole(size, num, shift) -> None:
    torch.manual_seed(0)
    block = VideoSwin(embed_dim=8, depths=(2,), num_heads=(2,), window=(4, 6, 3)).double().layers[0].blocks[1]
    assert isinstance(block, SwinBlock)
    block.attn.shift = shift
    x = torch.randn(2, *size, 8, dtype=torch.float64)
    for branch in residual_branches(block):
        parts = branch.cut.parts(block, x.shape, num)
        output = torch.full_like(x, torch.nan)
        for part in parts:
            pieces = torch.cat([x.narrow(part.axis, a, b - a) for a, b in part.spans], part.axis)
            update = (part.function or branch.function)(block, pieces)
            views = update.split([b - a for a, b in part.spans], part.axis)
            for (start, stop), view in zip(part.spans, views, strict=True):
                assert output.narrow(part.axis, start, stop - start).isnan().all()
                output.narrow(part.axis, start, stop - start).copy_(view)
        torch.testing.assert_close(output, branch.function(block, x), rtol=1e-12, atol=1e-12)


def test_the_last_row_of_a_shifted_grid_wraps_around() -> None:
    """13 frames in windows of 4, shifted by 2: [2, 6) [6, 10) [10, 13) + 1 of padding, then 2 of padding + [0, 2)."""
    block = VideoSwin(embed_dim=8, depths=(2,), num_heads=(2,), window=(4, 6, 6)).layers[0].blocks[1]
    window, shift = clip_window((13, 6, 6), block.attn.window, block.attn.shift)
    assert (window, shift) == ((4, 6, 6), (2, 0, 0))
    attention, _ = residual_branches(block)
    parts = attention.cut.parts(block, torch.Size((1, 13, 6, 6, 8)), 4)
    assert [part.spans for part in parts] == [((2, 6),), ((6, 10),), ((10, 13),), ((0, 2),)]
    (both,) = attention.cut.parts(block, torch.Size((1, 13, 6, 6, 8)), 1)
    assert both.spans == row_spans(both.function.keywords["rows"], window=window, shift=shift) == ((2, 13), (0, 2))


def test_under_autocast_pieces_are_near_whole_branches() -> None:
    found = []
    for chunk_mebibytes in (None, TINY):
        torch.manual_seed(0)
        swin = VideoSwin(**SIZES["swin3d_nano"])
        rewire(swin, config=RewiringConfig(chunk_mebibytes=chunk_mebibytes))
        found.append(results(swin, autocast=True))
    assert_near(found[1], found[0], relative=2e-2)


@pytest.mark.parametrize("name", ["swin3d_tiny", "slowfast_r50_8x8"])
def test_branches_need_inside_what_they_say(name: str) -> None:
    """The number of pieces follows from it. Attention's bias and the weights of few windows come on top: they are as
    large for a piece."""
    backbone = build_backbone(BackboneConfig(name=name, rewired=False, norm_eval=True))
    block = backbone.get_submodule("layers.1.blocks.0" if name.startswith("swin") else "slow_path.layer2.1")
    x = torch.randn(1, 32, 14, 28, 192) if name.startswith("swin") else torch.randn(1, 512, 4, 14, 14)
    for branch in residual_branches(block):
        for parameter in block.parameters():
            parameter.grad = torch.zeros_like(parameter)
        point = x.clone().requires_grad_()
        with LiveBytes() as live:
            edge = get_gradient_edge(branch.function(block, point))
            torch.autograd.backward((edge,), (x,))
        needed = live.peak / (x.numel() * x.element_size())
        assert branch.cut.inner_states(block, x.shape) == pytest.approx(needed, rel=0.2)


def test_a_budget_that_holds_a_whole_branch_cuts_nothing(num_pieces: list[int]) -> None:
    found = []
    for chunk_mebibytes in (None, 1e4):
        torch.manual_seed(0)
        found.append(results(build_backbone(BackboneConfig(name="swin3d_nano", chunk_mebibytes=chunk_mebibytes))))
    assert not num_pieces
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_batch_norm_in_training_refuses_to_be_cut() -> None:
    backbone = build_backbone(BackboneConfig(name="slowfast_nano", chunk_mebibytes=1))
    message = (
        r"InnerReluBottleneck bottleneck cannot be run in pieces: its BatchNorm3d takes its statistics .*norm_eval"
    )
    with pytest.raises(ValueError, match=message):
        backbone(torch.zeros(1, 3, 8, 32, 32), torch.ones(1, 8, dtype=torch.bool))
