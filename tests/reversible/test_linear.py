"""Linear layers of branches in pieces: gradients are those of whole branches, summed by the products themselves."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from reversible.networks import CHANNELS, assert_close, chain, coupled, gradients, states
from reversible.test_chunking import chunked
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from re2tal.reversible import run_reversibly
from re2tal.reversible.linear import AddingProducts, takes_products


class Shared(nn.Module):
    """One weight in two layers, and once outside of any."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-0.3, 0.4, CHANNELS**2).view(CHANNELS, CHANNELS))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(F.linear(x, self.weight)), self.weight) * self.weight.sum()


class Made(nn.Module):
    """A weight that is no leaf."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(-1, 1, CHANNELS))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(x), torch.diag(self.scale), bias=self.scale)


@pytest.mark.parametrize("known", [0, 3])
@pytest.mark.parametrize("kind", ["mlp", "transformer", Shared, Made])
def test_gradients_of_pieces_are_those_of_whole_branches(kind, known) -> None:
    branches = (chain(kind, 4) if isinstance(kind, str) else nn.ModuleList(kind() for _ in range(4))).double()
    x = states(dtype=torch.float64)
    run = partial(run_reversibly, chunked(branches, 3), saved_outputs=known, owner=branches)
    wanted = gradients(partial(coupled, branches), x, branches)
    assert_close(gradients(run, x, branches), wanted, relative=1e-12)


class Checkpointed(nn.Module):
    """Square layers, whose weights could be taken for transposed ones."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(CHANNELS, CHANNELS), nn.Linear(CHANNELS, CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(lambda x: self.down(torch.tanh(self.up(x))), x, use_reentrant=False)


@pytest.mark.parametrize("known", [0, 3])
@pytest.mark.parametrize("axes", [2, 3])
def test_layers_in_a_checkpoint_of_a_branch_are_left_alone(axes, known) -> None:
    branches, x = nn.ModuleList(Checkpointed() for _ in range(4)).double(), states(dtype=torch.float64)
    x = x if axes == 3 else x.flatten(0, 1)
    units = [replace(unit, last=branch.down) for unit, branch in zip(chunked(branches, 3), branches, strict=True)]
    run = partial(run_reversibly, units, saved_outputs=known, owner=branches)
    wanted = gradients(partial(coupled, branches), x, branches)
    assert_close(gradients(run, x, branches), wanted, relative=1e-12)


class Sums(TorchDispatchMode):
    """Shapes of what is added up in place."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, torch.Size]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.add_.Tensor, torch.ops.aten.addmm_.default):
            self.seen.append((func.__name__.partition(".")[0], args[0].shape))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("dtype", "added_by"), [(torch.float32, "addmm_"), (torch.bfloat16, "add_")])
def test_a_weights_sum_is_written_by_products_where_it_has_their_dtype(dtype, added_by) -> None:
    branches, x = chain("mlp", 2).to(dtype), states(dtype=dtype)
    output = run_reversibly(chunked(branches, 2), x, owner=branches)
    with Sums() as sums:
        output.float().sum().backward()
    up = branches[0].up.weight.shape
    assert {name for name, shape in sums.seen if shape == up} == {added_by}


def test_which_weights_take_products() -> None:
    x, weight = torch.ones(2, 3), nn.Parameter(torch.ones(4, 3))
    assert takes_products(x, weight)
    assert not takes_products(x, weight * 1)
    assert not takes_products(x, weight.detach())
    assert not takes_products(x.bfloat16(), nn.Parameter(weight.bfloat16()))
    with torch.autocast("cpu", torch.bfloat16):
        assert not takes_products(x, weight)


def test_layers_called_in_other_ways_are_left_alone() -> None:
    x, weight = torch.ones(2, 3), nn.Parameter(torch.ones(4, 3))
    with AddingProducts(lambda *_: None):
        by_name, by_position = F.linear(input=x, weight=weight), F.linear(x, weight)
    assert torch.equal(by_name, by_position)
    by_name.sum().backward()
    assert torch.equal(weight.grad, torch.full((4, 3), 2.0))
    by_position.sum().backward()
    assert torch.equal(weight.grad, torch.full((4, 3), 2.0))  # its products went elsewhere
