"""Attention with a bias on a CPU against the equation in float64, and what it keeps and needs."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from re2tal.backbones.swin3d import biased_attention
from re2tal.backbones.swin3d.biased_attention import Run, attend
from re2tal.reversible.fake import on_fake_tensors
from re2tal.reversible.live_bytes import LiveBytes

HEADS, TOKENS, WIDTH = 3, 10, 4


def by_equation(qkv: Tensor, bias: Tensor, runs: list[Run]) -> Tensor:
    """softmax(q k^T / sqrt(c) + bias) v, where masked logits are 100 less."""
    q, k, v = qkv.unflatten(-1, (3, len(bias), -1)).permute(2, 0, 3, 1, 4)
    masks = [(torch.zeros(bias.shape[1:]) if mask is None else -100.0 * mask).expand(num, -1, -1) for num, mask in runs]
    logits = q @ k.mT / math.sqrt(q.shape[-1]) + bias + torch.cat(masks)[:, None].to(bias.dtype)
    return (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)


def draw(num: int, *, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """qkv, bias and a gradient of the result."""
    generator = torch.Generator().manual_seed(0)
    shapes = (num, TOKENS, 3 * HEADS * WIDTH), (HEADS, TOKENS, TOKENS), (num, TOKENS, HEADS * WIDTH)
    qkv, bias, gradient = (torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes)
    return qkv.requires_grad_(), bias.requires_grad_(), gradient


def mask() -> Tensor:
    half = torch.arange(TOKENS) < TOKENS // 2
    return half[:, None] != half


RUNS = {"one run": [(7, None)], "masked": [(4, None), (1, mask()), (2, mask().roll(3))]}


@pytest.mark.parametrize("windows_at_a_time", [1, 2, 100])
@pytest.mark.parametrize("runs", RUNS.values(), ids=RUNS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_values_and_gradients_are_those_of_the_equation(dtype, runs, windows_at_a_time, monkeypatch) -> None:
    qkv, bias, gradient = draw(7, dtype=dtype)
    work = torch.promote_types(dtype, torch.float32)
    monkeypatch.setattr(biased_attention, "GROUP_BYTES", windows_at_a_time * TOKENS**2 * work.itemsize)
    exact = [tensor.detach().double().requires_grad_() for tensor in (qkv, bias)]
    found, wanted = attend(qkv, bias, runs), by_equation(*exact, runs)
    assert found.dtype == dtype
    found.backward(gradient)
    wanted.backward(gradient.double())
    error = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2}[dtype]
    for one, other in ((found, wanted), (qkv.grad, exact[0].grad), (bias.grad, exact[1].grad)):
        assert float((one - other).detach().norm() / other.detach().norm()) < error


def test_gradients_agree_with_differences() -> None:
    qkv, bias, _ = draw(7)
    assert torch.autograd.gradcheck(lambda qkv, bias: attend(qkv, bias, RUNS["masked"]), (qkv, bias), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_window_has_the_same_bits_among_any_others_and_with_no_gradient_wanted(dtype: torch.dtype) -> None:
    qkv, bias, _ = draw(7, dtype=dtype)
    whole = attend(qkv, bias, [(7, mask())])
    with torch.no_grad():
        parts = [attend(part, bias, [(len(part), mask())]) for part in qkv.split([1, 4, 2])]
    assert torch.equal(whole, torch.cat(parts))


@pytest.mark.parametrize("frozen", ["qkv", "bias"])
def test_frozen_parts_get_no_gradient_and_change_none(frozen: str) -> None:
    both, one = draw(7), draw(7)
    attend(both[0], both[1], RUNS["masked"]).backward(both[2])
    left, trained = (0, 1) if frozen == "qkv" else (1, 0)
    one[left].requires_grad_(False)
    attend(one[0], one[1], RUNS["masked"]).backward(one[2])
    assert one[left].grad is None
    assert torch.equal(one[trained].grad, both[trained].grad)


def test_under_autocast_the_bias_is_cast_and_its_gradient_is_not() -> None:
    qkv, bias, gradient = draw(7, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = attend(qkv.bfloat16(), bias, RUNS["masked"])
    assert found.dtype == torch.bfloat16
    found.backward(gradient.bfloat16())
    assert bias.grad.dtype == qkv.grad.dtype == torch.float32
    wanted = bias.detach().double().requires_grad_()
    by_equation(qkv.detach().double(), wanted, RUNS["masked"]).backward(gradient.double())
    assert float((bias.grad - wanted.grad).norm() / wanted.grad.norm()) < 2e-2


def test_a_second_derivative_is_refused() -> None:
    qkv, bias, gradient = draw(7)
    with pytest.raises(RuntimeError, match="differentiated only once on a CPU; leave out create_graph=True"):
        torch.autograd.grad(attend(qkv, bias, RUNS["one run"]), qkv, gradient, create_graph=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_where_only_bytes_count_two_groups_tell_the_peak_of_all(dtype, monkeypatch) -> None:
    """Three windows at a time: of four without a mask, and one and five with one, 2 + 1 + 2 groups for each head."""
    monkeypatch.setattr(biased_attention, "GROUP_BYTES", 3 * TOKENS**2 * 4)
    ran, of_group = [], biased_attention._gradients_of_group
    monkeypatch.setattr(
        biased_attention, "_gradients_of_group", lambda *args, **options: ran.append(1) or of_group(*args, **options)
    )

    def measured(qkv: Tensor, bias: Tensor, gradient: Tensor) -> tuple[int, int]:
        ran.clear()
        found = attend(qkv, bias, [(4, None), (1, mask()), (5, mask().roll(3))])
        with LiveBytes() as live:
            found.backward(gradient)
        return live.peak, len(ran)

    peak, groups = measured(*draw(10, dtype=dtype))
    assert groups == HEADS * 5
    _, mode = on_fake_tensors(nn.Identity, dtype=dtype, device=torch.device("cpu"))
    with mode:
        qkv, bias, gradient = (torch.empty(one.shape, dtype=dtype) for one in draw(10))
        assert measured(qkv.requires_grad_(), bias.requires_grad_(), gradient) == (peak, 2)


@pytest.mark.parametrize("fake", [False, True], ids=["real", "fake"])
def test_no_matrix_of_all_windows_is_kept_or_made(fake: bool, monkeypatch) -> None:
    """Kept are the two inputs; backwards there are their gradients and two matrices of each window of a group."""
    num, matrix = 60, TOKENS**2 * 4
    monkeypatch.setattr(biased_attention, "GROUP_BYTES", 2 * matrix)
    saved: list[Tensor] = []
    with FakeTensorMode() if fake else torch.enable_grad():
        qkv = torch.randn(num, TOKENS, 3 * HEADS * WIDTH, requires_grad=True)
        bias = torch.randn(HEADS, TOKENS, TOKENS, requires_grad=True)
        gradient = torch.randn(num, TOKENS, HEADS * WIDTH)
        with saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
            found = attend(qkv, bias, [(num, None)])
        with LiveBytes() as live:
            found.backward(gradient)
    assert [tensor.shape for tensor in saved] == [qkv.shape, bias.shape]
    narrow = 2 * TOKENS * WIDTH * 4
    assert live.peak == qkv.nbytes + bias.nbytes + 2 * 2 * matrix + narrow + matrix


def test_on_the_meta_device_there_are_shapes() -> None:
    qkv, bias, _ = (tensor.detach().to("meta").requires_grad_() for tensor in draw(7))
    found = attend(qkv, bias, [(7, None)])
    found.sum().backward()
    assert found.shape == (7, TOKENS, HEADS * WIDTH)
    assert (qkv.grad.shape, bias.grad.shape) == (qkv.shape, bias.shape)
