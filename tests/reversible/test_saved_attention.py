"""Branches that save what their attention kernels return: the same gradients to the last bit, and kernels run once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from re2tal.reversible import run_reversibly
from re2tal.reversible.chunking import ChunkedBranch, Piece

KERNEL = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


class Attention(nn.Module):
    """(B, T, 16) -> the same."""

    def __init__(self, *, dropout: float = 0.0, in_place: bool = False) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.dropout, self.in_place = dropout, in_place

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        heads = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout)
        if self.in_place:
            heads = heads.mul_(0.5)
        return F.dropout(self.out(heads.transpose(1, 2).flatten(2)), 0.2)


class Mlp(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.LayerNorm(16), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))


class Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[Any] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.calls[func] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def kernels() -> Iterator[Counter[Any]]:
    with Counting() as mode:
        yield mode.calls


def network(**options: Any) -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList(branch for _ in range(3) for branch in (Attention(**options), Mlp()))


def gradients(branches: nn.ModuleList, *, functions: list | None = None, autocast: bool = False, **options: Any):
    torch.manual_seed(1)
    x = torch.randn(4, 6, 16, requires_grad=True)
    branches.zero_grad()
    torch.manual_seed(2)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = run_reversibly(functions or list(branches), x, grid=2.0**-14, owner=branches, **options)
    output.square().sum().backward()
    return [x.grad, *(parameter.grad for parameter in branches.parameters())]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(("saved", "calls"), [(0, 6), (1, 5), (2, 4), (3, 3), (99, 3)])
def test_gradients_are_the_same_bits_and_kernels_run_once(saved: int, calls: int, autocast: bool) -> None:
    branches = network()
    wanted = gradients(branches, recompute=False, autocast=autocast)
    with kernels() as counted:
        found = gradients(branches, saved_attention=saved, autocast=autocast)
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
    assert counted[KERNEL] == calls


def test_saved_outputs_and_branches_go_together_with_it() -> None:
    branches = network()
    wanted = gradients(branches, recompute=False)
    with kernels() as counted:
        found = gradients(branches, saved_attention=9, saved_outputs=2, saved_branches=2)
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
    assert counted[KERNEL] == 3


def test_pieces_save_theirs_in_order() -> None:
    branches = network()

    def pieces(branch: nn.Module) -> ChunkedBranch:
        cut = [Piece(0, ((start, start + 2),), branch) for start in (0, 2)]
        return ChunkedBranch("branch", branch, lambda state: cut, same_draws=False)

    functions = [pieces(branch) for branch in branches]
    wanted = gradients(branches, functions=functions)
    with kernels() as counted:
        found = gradients(branches, functions=functions, saved_attention=3)
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
    assert counted[KERNEL] == 6


def test_a_branch_that_overwrites_the_output_is_refused_as_by_autograd() -> None:
    with pytest.raises(RuntimeError, match=r"writes to what .* returned|modified by an inplace operation"):
        gradients(network(in_place=True), saved_attention=3)


def test_a_mask_that_is_trained_is_an_error_where_another_kernel_replays_it() -> None:
    weight = nn.Parameter(torch.ones(1, dtype=torch.float64))
    owner = nn.ParameterList([weight])

    def branch(x: Tensor) -> Tensor:
        first = F.scaled_dot_product_attention(x, x, x, attn_mask=weight * torch.eye(5, dtype=x.dtype))
        return F.scaled_dot_product_attention(first, x, x)

    def gradient(**options: Any) -> Tensor:
        weight.grad = None
        x = torch.randn(2, 1, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        run_reversibly([branch], x, owner=owner, **options).square().sum().backward()
        return weight.grad

    torch.testing.assert_close(gradient(), gradient(recompute=False))
    with pytest.raises(RuntimeError, match=r"less often than in forward; .* saved_attention to 0"):
        gradient(saved_attention=1)


def test_a_write_to_what_a_kernel_returned_is_an_error_although_no_input_wants_a_gradient() -> None:
    weight = nn.Parameter(torch.ones(1))
    with pytest.raises(RuntimeError, match=r"writes to what .* returned; set saved_attention to 0"):
        run_reversibly(
            [lambda x: F.scaled_dot_product_attention(x, x, x).mul_(3) * weight],
            torch.randn(2, 1, 5, 4),
            owner=nn.ParameterList([weight]),
            saved_attention=1,
        )


def test_attention_with_dropout_is_run_again_with_the_same_draws() -> None:
    branches = network(dropout=0.3)
    wanted = gradients(branches, recompute=False)
    found = gradients(branches, saved_attention=3)
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


def test_a_branch_that_attends_otherwise_the_second_time_is_an_error() -> None:
    branches = network()
    shapes = iter([6, 6, 6, 3])

    class Changing(Attention):
        def forward(self, x: Tensor) -> Tensor:
            length = next(shapes)
            return super().forward(x[:, :length]) if length == 6 else super().forward(x[:, :3]).repeat(1, 2, 1)

    branches[0] = Changing()
    gradients(branches, saved_attention=3)
    with pytest.raises(RuntimeError, match=r"queries of shape \(4, 2, 3, 8\).* set saved_attention to 0"):
        gradients(branches, saved_attention=3)


def test_a_negative_number_is_refused() -> None:
    with pytest.raises(ValueError, match="saved_attention is -1; give a number of branches"):
        gradients(network(), saved_attention=-1)
