"""Two streams through the engine: y1 = x1 + F(x2), y2 = x2 + G(y1), against plain autograd of these lines."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from re2tal.reversible import run_reversibly
from re2tal.reversible.coupling import Coupling
from re2tal.reversible.live_bytes import LiveBytes


def branches(number: int) -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList(
        nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 6)) for _ in range(number)
    ).double()


def drawn() -> Tensor:
    return torch.randn(2, 3, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def written_out(layers: nn.ModuleList, x: Tensor) -> Tensor:
    first, second = x
    for layer in layers:
        first, second = second, first + layer(second)
    return torch.stack((first, second))


@pytest.mark.parametrize("number", [1, 2, 3, 6])
@pytest.mark.parametrize("saved", [0, 1, 2])
def test_outputs_and_gradients_are_those_of_plain_autograd(number, saved) -> None:
    results = []
    weights = torch.linspace(-1, 1, drawn().numel(), dtype=torch.float64).view(drawn().shape)
    for reversible in (True, False):
        layers, x = branches(number), drawn().requires_grad_()
        before = x.detach().clone()
        if reversible:
            output = run_reversibly(list(layers), x, streams=True, owner=layers, saved_branches=saved)
        else:
            output = written_out(layers, x)
        gradient = weights.clone()
        output.backward(gradient)
        assert torch.equal(x, before)
        assert torch.equal(gradient, weights)
        results.append([output, x.grad, *(parameter.grad for parameter in layers.parameters())])
    torch.testing.assert_close(*results, rtol=1e-11, atol=1e-12)


def test_without_gradients_nothing_is_written_that_is_not_ours() -> None:
    layers, x = branches(4), drawn()
    with torch.no_grad():
        output = run_reversibly(list(layers), x, streams=True)
        torch.testing.assert_close(output, written_out(layers, x))
    assert torch.equal(x, drawn())


def test_memory_does_not_grow_with_depth() -> None:
    peaks = []
    for number in (4, 16):
        layers, x = branches(number), drawn().requires_grad_()
        for parameter in layers.parameters():
            parameter.grad = torch.zeros_like(parameter)
        with LiveBytes() as live:
            run_reversibly(list(layers), x, streams=True, owner=layers).sum().backward()
        peaks.append(live.peak)
    assert peaks[1] < 1.1 * peaks[0]


def test_other_couplings_are_refused() -> None:
    with pytest.raises(ValueError, match="two streams are coupled by sums, and stacked"):
        run_reversibly(list(branches(2)), drawn(), streams=True, coupling=Coupling(0.5, 0.5))
