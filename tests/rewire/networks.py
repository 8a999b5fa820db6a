"""Residual blocks and networks to rewire."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from re2tal.rewire import Branch, residual_branches, why_not_residual, wrap_output

CHANNELS = 8


class Block(nn.Module):
    """Mixing over tokens under a mask, then an MLP: (B, T, C) -> (B, T, C)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(CHANNELS), nn.LayerNorm(CHANNELS)
        self.mixer = nn.Linear(CHANNELS, CHANNELS)
        self.mlp = nn.Sequential(nn.Linear(CHANNELS, 2 * CHANNELS), nn.GELU(), nn.Linear(2 * CHANNELS, CHANNELS))

    def mix(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        mixed = self.mixer(self.norm1(x))
        return mixed if mask is None else mixed * mask[..., None]

    def transform(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.mlp(self.norm2(x))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.mix(x, mask)
        return x + self.transform(x, mask)


@residual_branches.register
def _(block: Block) -> tuple[Branch, ...]:
    return Branch("mix", Block.mix), Branch("mlp", Block.transform)


class ScaledBlock(nn.Module):
    """x + scale * f(x), the scale a parameter of the block itself; returns a tuple, as many do."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(CHANNELS, CHANNELS)
        self.scale = nn.Parameter(torch.full((CHANNELS,), 0.5))

    def branch(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.scale * torch.tanh(self.f(x))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, None]:
        return x + self.branch(x), None


@residual_branches.register
def _(block: ScaledBlock) -> tuple[Branch, ...]:
    return (Branch("scaled", ScaledBlock.branch, through_block=True),)


@wrap_output.register
def _(block: ScaledBlock, x: Tensor) -> tuple[Tensor, None]:
    return x, None


class Downsample(nn.Module):
    """Halves the tokens where `stride` is 2; residual only where it is 1."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.f = nn.Linear(CHANNELS, CHANNELS)

    def branch(self, x: Tensor) -> Tensor:
        return F.relu(self.f(x))

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :: self.stride] + self.branch(x[:, :: self.stride])


@residual_branches.register
def _(block: Downsample) -> tuple[Branch, ...]:
    return (Branch("bottleneck", Downsample.branch),) if block.stride == 1 else ()


@why_not_residual.register
def _(block: Downsample) -> str:
    return f"it keeps one token in {block.stride}"


class PostNorm(nn.Module):
    """norm(x + f(x)): not residual, and not registered."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.norm = nn.Linear(CHANNELS, CHANNELS), nn.LayerNorm(CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.f(x))


class Walker(nn.Module):
    """A network that walks along its list of layers, as those of transformers do, passing a mask."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Linear(3, CHANNELS)
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            output = layer(x, mask=mask)
            x = output[0] if isinstance(output, tuple) else output
        return x


class Caller(nn.Module):
    """A network that calls its stages: the first halves the tokens before its residual blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(3, CHANNELS), nn.GELU())
        self.stages = nn.ModuleList(
            nn.Sequential(Downsample(2), Downsample(1), Downsample(1), Downsample(2), Block()) for _ in range(2)
        )
        self.tail = nn.Sequential(PostNorm(), PostNorm())

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return self.tail(x)


def seeded(build, *args, seed: int = 0):
    """`build(*args)` with parameters drawn from a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build(*args).double()


def frames(batch: int = 2, tokens: int = 16) -> Tensor:
    return torch.randn(batch, tokens, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def walker(*kinds: type[nn.Module]) -> Walker:
    return seeded(lambda: Walker(*(kind() for kind in kinds)))
