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


def drawn(axis: int = 0) -> Tensor:
    shape = [3, 5, 6]
    shape[axis] *= 2
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def written_out(layers: nn.ModuleList, x: Tensor, axis: int = 0) -> Tensor:
    first, second = x.chunk(2, axis)
    for layer in layers:
        first, second = second, first + layer(second)
    return torch.cat((first, second), axis)


@pytest.mark.parametrize("number", [1, 2, 3, 6])
@pytest.mark.parametrize("saved", [0, 1, 2])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_outputs_and_gradients_are_those_of_plain_autograd(number, saved, axis) -> None:
    results = []
    weights = torch.linspace(-1, 1, drawn(axis).numel(), dtype=torch.float64).view(drawn(axis).shape)
    for reversible in (True, False):
        layers, x = branches(number), drawn(axis).requires_grad_()
        before = x.detach().clone()
        if reversible:
            output = run_reversibly(list(layers), x, streams=axis, owner=layers, saved_branches=saved)
        else:
            output = written_out(layers, x, axis)
        gradient = weights.clone()
        output.backward(gradient)
        assert torch.equal(x, before)
        assert torch.equal(gradient, weights)
        results.append([output, x.grad, *(parameter.grad for parameter in layers.parameters())])
    torch.testing.assert_close(*results, rtol=1e-11, atol=1e-12)


def test_without_gradients_nothing_is_written_that_is_not_ours() -> None:
    layers, x = branches(4), drawn()
    with torch.no_grad():
        output = run_reversibly(list(layers), x, streams=0)
        torch.testing.assert_close(output, written_out(layers, x))
    assert torch.equal(x, drawn())


def test_memory_does_not_grow_with_depth() -> None:
    peaks = []
    for number in (4, 16):
        layers, x = branches(number), drawn().requires_grad_()
        for parameter in layers.parameters():
            parameter.grad = torch.zeros_like(parameter)
        with LiveBytes() as live:
            run_reversibly(list(layers), x, streams=0, owner=layers).sum().backward()
        peaks.append(live.peak)
    assert peaks[1] < 1.1 * peaks[0]


@pytest.mark.parametrize(("x", "coupling"), [(drawn(), Coupling(0.5, 0.5)), (drawn()[1:], Coupling())])
def test_other_couplings_and_half_streams_are_refused(x, coupling) -> None:
    with pytest.raises(ValueError, match="two streams are coupled by sums, and lie side by side along axis 0"):
        run_reversibly(list(branches(2)), x, streams=0, coupling=coupling)
