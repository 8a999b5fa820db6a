"""Attention against the definition with explicit score matrices, and what padding may and may not change."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from re2tal.localizers.pyramid.encoder import sinusoids, stretch
from re2tal.localizers.pyramid.transformer import TransformerBlock, attend_globally, attend_locally


def attention_by_definition(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor) -> Tensor:
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    return scores.masked_fill(~allowed, -torch.inf).softmax(dim=-1) @ value


def random_heads(num_steps: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_steps)
    query, key, value = torch.randn(3, 2, 3, num_steps, 4, generator=generator, dtype=torch.float64)
    return query, key, value


@pytest.mark.parametrize("num_steps", [1, 5, 12, 23])
@pytest.mark.parametrize("reach", [1, 2, 5])
def test_local_attention_is_attention_with_a_band(num_steps: int, reach: int) -> None:
    query, key, value = random_heads(num_steps)
    mask = torch.arange(num_steps) < torch.tensor([[num_steps], [max(1, num_steps - 4)]])
    steps = torch.arange(num_steps)
    near = (steps[:, None] - steps).abs() <= reach
    ours = attend_locally(query, key, value, mask, reach=reach)
    reference = attention_by_definition(query, key, value, near & mask[:, None, None])
    real = mask[:, None, :, None].expand_as(ours)
    torch.testing.assert_close(ours[real], reference[real], rtol=1e-12, atol=1e-12)
    assert ours.isfinite().all()


def test_global_attention_reaches_all_real_steps_only() -> None:
    query, key, value = random_heads(9)
    mask = torch.arange(9) < torch.tensor([[9], [6]])
    reference = attention_by_definition(query, key, value, mask[:, None, None])
    torch.testing.assert_close(attend_globally(query, key, value, mask), reference, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("window", [None, 3])
def test_a_clip_of_nothing_but_padding_gives_zeros_and_finite_gradients(window: int | None) -> None:
    block = TransformerBlock(8, num_heads=2, stride=2, window=window, dropout=0.0, path_drop=0.0)
    mask = torch.arange(8) < torch.tensor([[8], [0]])
    x = torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(0)) * mask[:, None]
    out, out_mask = block(x, mask)
    assert out_mask.tolist() == [[True] * 4, [False] * 4]
    assert torch.count_nonzero(out[1]) == 0
    out.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in block.parameters())


def test_stochastic_depth_drops_whole_clips_and_keeps_the_mean() -> None:
    block = TransformerBlock(8, num_heads=2, stride=1, window=None, dropout=0.0, path_drop=0.5)
    path = block.attention_path
    path.scale.data.fill_(1.0)
    torch.manual_seed(0)
    out = path(torch.ones(2000, 8, 3))
    assert set(out.unique().tolist()) == {0.0, 2.0}
    assert (out.amax(dim=(1, 2)) == out.amin(dim=(1, 2))).all()
    assert out.mean().item() == pytest.approx(1.0, abs=0.1)
    assert torch.equal(path.eval()(torch.ones(2, 8, 3)), torch.ones(2, 8, 3))


def test_the_position_encoding_is_stretched_over_clips_longer_than_it() -> None:
    encoding = sinusoids(16, 6)
    assert encoding[0, 0, 3].item() == pytest.approx(math.sin(3) / math.sqrt(6))
    assert encoding[0, 3, 3].item() == pytest.approx(math.cos(3 / 10_000 ** (2 / 6)) / math.sqrt(6))
    assert torch.equal(stretch(encoding, 9), encoding[..., :9])
    twice = stretch(encoding, 32)
    torch.testing.assert_close(twice[..., 1], 0.75 * encoding[..., 0] + 0.25 * encoding[..., 1])
