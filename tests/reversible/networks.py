"""Branches to run reversibly, and the plain sequences that they must equal."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHANNELS = 8


class DropPath(nn.Module):
    """Drops a whole sample with a probability."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.probability:
            return x
        keep = torch.rand(x.shape[0], *[1] * (x.ndim - 1), dtype=x.dtype, device=x.device) >= self.probability
        return x * keep / (1 - self.probability)


class Attention(nn.Module):
    """Pre-norm attention with two heads: (B, T, C) -> (B, T, C)."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(CHANNELS)
        self.qkv = nn.Linear(CHANNELS, 3 * CHANNELS)
        self.out = nn.Linear(CHANNELS, CHANNELS)
        self.drop = nn.Dropout(dropout)
        self.drop_path = DropPath(dropout)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.drop_path(self.drop(self.out(mixed)))


class Mlp(nn.Module):
    """Pre-norm MLP: (B, T, C) -> (B, T, C)."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(CHANNELS)
        self.up = nn.Linear(CHANNELS, 2 * CHANNELS)
        self.down = nn.Linear(2 * CHANNELS, CHANNELS)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.down(F.gelu(self.up(self.norm(x)))))


class Conv(nn.Module):
    """Two convolutions with BatchNorm: (B, C, T) -> (B, C, T)."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(CHANNELS, CHANNELS, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm1d(CHANNELS)
        self.conv2 = nn.Conv1d(CHANNELS, CHANNELS, 1, bias=False)
        self.norm2 = nn.BatchNorm1d(CHANNELS)
        self.drop_path = DropPath(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop_path(F.relu(self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))))


KINDS: dict[str, Sequence[type[nn.Module]]] = {"transformer": (Attention, Mlp), "mlp": (Mlp,), "conv": (Conv,)}


def chain(kind: str, length: int, *, dropout: float = 0.0, seed: int = 0) -> nn.ModuleList:
    """`length` branches of a kind in training mode, float32, the same for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.ModuleList(KINDS[kind][index % len(KINDS[kind])](dropout) for index in range(length))


def states(seed: int = 0, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """(B, 8, 8): tokens by channels, or channels by time."""
    return torch.randn(3, CHANNELS, CHANNELS, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def coupled(
    branches: Sequence[Callable[[Tensor], Tensor]],
    x: Tensor,
    *,
    merge: str = "mean",
    alpha: float = 0.0,
    beta: float = 1.0,
) -> Tensor:
    """The rewired network, written down as the papers do, for plain autograd."""
    previous = current = x
    if (alpha, beta) == (0, 1):
        for branch in branches:
            previous, current = current, previous + branch(current)
        return (previous + current) / 2 if merge == "mean" else previous + current - x
    for branch in branches:
        previous, current = current, branch(current) + alpha * current + beta * previous
    return (current + beta * previous) / (1 + beta) if merge == "mean" else current + beta * previous - beta * x


def gradients(run: Callable[[Tensor], Tensor], x: Tensor, module: nn.Module, *, seed: int = 0) -> dict[str, Tensor]:
    """The output of `run`, all gradients of a loss that tells its elements apart, and the next draw after it."""
    for parameter in module.parameters():
        parameter.grad = None
    x = x.clone().requires_grad_()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        output = run(x)
        weights = torch.linspace(-1, 2, output.numel(), dtype=output.dtype).reshape(output.shape)
        (output * weights + output**2).sum().backward()
        next_draw = torch.rand(3)
    assert x.grad is not None
    found = {"output": output.detach(), "x": x.grad, "next draw": next_draw}
    return found | {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def assert_close(found: dict[str, Tensor], wanted: dict[str, Tensor], *, relative: float) -> None:
    """Every tensor to `relative` of its largest element."""
    assert found.keys() == wanted.keys()
    for name, want in wanted.items():
        error = (found[name] - want).abs().max() / want.abs().max().clamp_min(1e-30)
        assert error <= relative, f"{name}: {error:.1e} of the largest element"


def assert_same_bits(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Every tensor equal."""
    assert found.keys() == wanted.keys()
    for name, want in wanted.items():
        assert found[name].dtype == want.dtype, name
        assert torch.equal(found[name], want), f"{name}: {(found[name] - want).abs().max():.1e} off"
