"""Video Swin's parts that no reference vector shows: sizes, drop-path, kinds of windows, tables."""

from __future__ import annotations

import copy
import itertools
from collections import defaultdict

import numpy as np
import pytest
import torch

from re2tal.backbones.base import steps_mask
from re2tal.backbones.swin3d.network import SIZES, DropPath, VideoSwin
from re2tal.backbones.swin3d.shifted_windows import (
    WindowTables,
    partition,
    reorder,
    restore,
    window_kinds,
    window_regions,
)
from re2tal.backbones.swin3d.window_attention import WindowAttention
from re2tal.rewire import RewiringConfig, rewire


@pytest.mark.parametrize(
    ("name", "millions"),
    # The paper's table 1 (28.2, 49.8 and 88.1 with a 400-way classifier), less that classifier.
    [("swin3d_tiny", 28.2 - 0.3), ("swin3d_small", 49.8 - 0.3), ("swin3d_base", 88.1 - 0.4)],
)
def test_sizes_have_the_published_number_of_parameters(name: str, millions: float) -> None:
    with torch.device("meta"):
        swin = VideoSwin(**SIZES[name])
    assert sum(parameter.numel() for parameter in swin.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)


def test_one_head_count_per_stage_is_demanded() -> None:
    with pytest.raises(ValueError, match=r"one num_heads per stage, got depths \(2, 2\) and num_heads \(2,\)"):
        VideoSwin(embed_dim=8, depths=(2, 2), num_heads=(2,), window=(2, 3, 3))


def test_channels_must_divide_into_heads() -> None:
    with pytest.raises(ValueError, match="8 channels do not divide into 3 heads"):
        VideoSwin(embed_dim=8, depths=(2,), num_heads=(3,), window=(2, 3, 3))


def test_restore_undoes_partition_and_drops_the_padding() -> None:
    x = torch.arange(2 * 3 * 7 * 4 * 5.0).view(2, 3, 7, 4, 5)
    windows = partition(x, window=(2, 3, 4), shift=(0, 0, 0))
    assert windows.shape == (2 * 3 * 1, 2, 24, 5)
    assert torch.equal(restore(windows, grid=(3, 7, 4), window=(2, 3, 4)), x)


@pytest.mark.parametrize("wrapped", [(0, 0, 0), (1, 2, 0)])
def test_one_reordering_is_roll_partition_and_sorting_there_and_back(wrapped: tuple[int, int, int]) -> None:
    window, shift, cpu = (2, 3, 4), (1, 2, 0), torch.device("cpu")
    x = torch.randn(2, 4, 6, 4, 5, dtype=torch.float64, requires_grad=True)
    wanted = partition(x, window=window, shift=shift)
    if any(wrapped):
        wanted = wanted.index_select(0, window_kinds((2, 2, 1), window=window, shift=wrapped, device=cpu).order)
    order, inverse = WindowTables().tokens((2, 4, 6, 4), window=window, shift=shift, wrapped=wrapped, device=cpu)
    windows = reorder(x.flatten(0, 3), order, inverse)
    assert torch.equal(windows.view_as(wanted), wanted)
    assert torch.equal(reorder(windows, inverse, order).view_as(x), x)
    weight = torch.randn_like(windows)
    found, want = (torch.autograd.grad((y.flatten(0, -2) * weight).sum(), x) for y in (windows, wanted))
    assert torch.equal(found[0], want[0])


def test_windows_sorted_by_kind_keep_their_masks() -> None:
    counts, window, shift = (3, 2, 4), (4, 3, 2), (2, 1, 1)
    kinds = window_kinds(counts, window=window, shift=shift, device=torch.device("cpu"))
    regions = window_regions(counts, window=window, shift=shift)
    assert len(kinds.sizes) == 8
    assert kinds.order.sort().values.tolist() == list(range(24))
    by_window = kinds.masks.repeat_interleave(torch.tensor(kinds.sizes), dim=0)[kinds.order.argsort()]
    np.testing.assert_array_equal(by_window.numpy(), regions[:, :, None] != regions[:, None, :])


def attention_by_description(attention: WindowAttention, x: torch.Tensor) -> torch.Tensor:
    """Group by group: tokens in one window of the shifted grid that lay on the same side of its border before."""
    grid, heads = tuple(x.shape[1:4]), attention.num_heads
    window = tuple(min(sizes) for sizes in zip(grid, attention.window, strict=True))
    shift = tuple(
        step * (size > full) for size, full, step in zip(grid, attention.window, attention.shift, strict=True)
    )
    padded = tuple(-(-size // full) * full for size, full in zip(grid, window, strict=True))
    whole = x.new_zeros(len(x), *padded, x.shape[-1])
    whole[:, : grid[0], : grid[1], : grid[2]] = x
    groups = defaultdict(list)
    for place in itertools.product(*map(range, padded)):
        shifted = [(at - step) % size for at, step, size in zip(place, shift, padded, strict=True)]
        number = tuple(at // size for at, size in zip(shifted, window, strict=True))
        wrapped = tuple(at < step for at, step in zip(place, shift, strict=True))
        token = np.ravel_multi_index([at % size for at, size in zip(shifted, window, strict=True)], window)
        groups[number, wrapped].append((*place, int(token)))
    query, key, value = attention.qkv(whole).unflatten(-1, (3, heads, -1)).unbind(4)
    mixed = torch.zeros_like(whole).unflatten(-1, (heads, -1))
    # A clipped window takes the rows of the full window's first tokens.
    offset = np.stack(np.unravel_index(np.arange(np.prod(window)), attention.window), axis=1)
    for members in groups.values():
        d, h, w, token = np.array(members).T
        apart = offset[token][:, None] - offset[token] + np.array(attention.window) - 1
        rows = np.ravel_multi_index(tuple(apart.transpose(2, 0, 1)), [2 * size - 1 for size in attention.window])
        logits = torch.einsum("bqhc,bkhc->bhqk", query[:, d, h, w], key[:, d, h, w]) / query.shape[-1] ** 0.5
        shares = (logits + attention.relative_position_bias_table[rows].permute(2, 0, 1)).softmax(dim=-1)
        mixed[:, d, h, w] = torch.einsum("bhqk,bkhc->bqhc", shares, value[:, d, h, w])
    return attention.proj(mixed.flatten(-2)[:, : grid[0], : grid[1], : grid[2]])


@pytest.mark.parametrize("seed", range(8))
def test_attention_is_that_of_the_description_on_any_grid(seed: int) -> None:
    """Also where the grid is smaller than the window, or no multiple of it."""
    random = np.random.default_rng(seed)
    torch.manual_seed(seed)
    window = tuple(int(size) for size in random.integers(1, 5, 3))
    shift = tuple(size // 2 for size in window) if seed % 4 else (0, 0, 0)
    attention = WindowAttention(4, num_heads=2, window=window, shift=shift, tables=WindowTables()).double()
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(2, *random.integers(1, 8, 3).tolist(), 4, dtype=torch.float64)
    torch.testing.assert_close(attention(x), attention_by_description(attention, x), rtol=0, atol=1e-12)


def test_tables_are_built_once_and_do_not_pile_up() -> None:
    tables, cpu = WindowTables(capacity=2), torch.device("cpu")
    first = tables.position_index((2, 3, 3), 18, device=cpu)
    assert tables.position_index((2, 3, 3), 18, device=cpu) is first
    tables.position_index((2, 3, 3), 9, device=cpu)
    tables.position_index((2, 3, 3), 6, device=cpu)
    assert tables.position_index((2, 3, 3), 18, device=cpu) is not first


def test_tables_first_used_in_inference_serve_training_later() -> None:
    swin = VideoSwin(embed_dim=8, depths=(2,), num_heads=(2,), window=(2, 3, 3))
    frames, mask = torch.randn(1, 3, 6, 20, 20), torch.ones(1, 6, dtype=torch.bool)
    with torch.inference_mode():
        swin(frames, mask)
    swin(frames, mask).values.sum().backward()
    assert swin.layers[0].blocks[1].attn.relative_position_bias_table.grad is not None


def test_a_copy_computes_the_same_and_shares_no_weights() -> None:
    swin = VideoSwin(embed_dim=8, depths=(2,), num_heads=(2,), window=(2, 3, 3)).eval()
    twin = copy.deepcopy(swin)
    frames, mask = torch.randn(1, 3, 6, 20, 20), torch.ones(1, 6, dtype=torch.bool)
    assert torch.equal(swin(frames, mask).values, twin(frames, mask).values)
    assert not {p.data_ptr() for p in swin.parameters()} & {p.data_ptr() for p in twin.parameters()}


def test_drop_path_drops_whole_clips_at_its_rate_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    dropped = DropPath(0.25)(torch.ones(4000, 2, 3))
    per_clip = dropped.flatten(1)
    assert torch.equal(per_clip, per_clip[:, :1].expand_as(per_clip))
    assert sorted(set(per_clip[:, 0].tolist())) == pytest.approx([0, 1 / 0.75])
    assert float((per_clip[:, 0] == 0).float().mean()) == pytest.approx(0.25, abs=0.03)


def test_drop_path_does_nothing_in_evaluation() -> None:
    x = torch.ones(8, 2)
    assert DropPath(0.9).eval()(x) is x


def test_drop_path_grows_linearly_with_depth() -> None:
    swin = VideoSwin(embed_dim=8, depths=(2, 3), num_heads=(2, 2), window=(2, 3, 3), drop_path=0.4)
    rates = [module.rate for module in swin.modules() if isinstance(module, DropPath)]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_impossible_drop_path_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match=rf"drop_path is {rate}; give a rate of at least 0 and below 1"):
        DropPath(rate)


def test_a_step_is_valid_where_any_of_its_frames_is() -> None:
    mask = torch.tensor([[True, True, True, False, False], [False, True, False, False, True]])
    assert steps_mask(mask, frames_per_step=2).tolist() == [[True, True, False], [True, False, True]]


def test_rebuilding_replays_drop_path() -> None:
    """The same draws forwards and in the rebuild, new ones each step, and as many as the network that keeps all."""
    frames, mask = torch.randn(4, 3, 6, 20, 20, dtype=torch.float64), torch.ones(4, 6, dtype=torch.bool)
    gradients, values = [], []
    for recompute in (True, False):
        torch.manual_seed(0)
        swin = VideoSwin(embed_dim=8, depths=(2, 2), num_heads=(2, 2), window=(2, 3, 3), drop_path=0.5).double()
        rewire(swin, config=RewiringConfig(recompute=recompute))
        steps = [swin(frames, mask).values for _ in range(2)]
        sum(step.square().sum() for step in steps).backward()
        values.append([*steps, torch.rand(1)])
        gradients.append([parameter.grad for parameter in swin.parameters()])
    assert not torch.equal(values[0][0], values[0][1])
    for rebuilt, kept in zip(values[0] + gradients[0], values[1] + gradients[1], strict=True):
        torch.testing.assert_close(rebuilt, kept, rtol=1e-10, atol=1e-12)


def test_bfloat16_autocast_stays_near_float32() -> None:
    torch.manual_seed(0)
    swin = VideoSwin(embed_dim=16, depths=(2, 2), num_heads=(2, 2), window=(2, 3, 3))
    frames, mask = torch.randn(1, 3, 6, 44, 44), torch.ones(1, 6, dtype=torch.bool)
    exact = swin(frames, mask).values.detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = swin(frames, mask).values
    rounded.sum().backward()
    assert float((rounded.detach().float() - exact).abs().max() / exact.abs().max()) < 0.03
    assert all(parameter.grad.dtype == torch.float32 for parameter in swin.parameters())


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("index", [0, 1], ids=["unshifted", "shifted"])
def test_a_branch_gives_the_same_bits_with_and_without_gradients(device: str, dtype: torch.dtype, index: int) -> None:
    torch.manual_seed(0)
    swin = VideoSwin(embed_dim=32, depths=(2,), num_heads=(2,), window=(8, 4, 4)).to(device)
    block, x = swin.layers[0].blocks[index], torch.randn(2, 16, 9, 9, 32, device=device)
    with torch.autocast(device, dtype=dtype, enabled=dtype == torch.bfloat16):
        with torch.no_grad():
            forgotten = block.attention_branch(x)
        rebuilt = block.attention_branch(x)
    assert torch.equal(forgotten, rebuilt)
