"""RevNet (Gomez et al., NeurIPS 2017): a residual network of pictures that was reversible before anybody rewired one.

    picture -> convolution, norm, ReLU, max pool -> its channels are two streams, half each
    unit       y1 = skip(x1) + F(x2),  y2 = skip(x2) + G(y1)      F, G: norm, ReLU, convolution, two or three times
    at the end both streams side by side -> norm, ReLU -> mean over H and W

skip is the identity but in the first unit of most stages, which changes width or resolution: there it is a convolution
of 1 x 1 (bottlenecks) or a mean over 2 x 2 and channels of zeros. `rewire(model)` keeps the function, and runs all
other units reversibly.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from re2tal.backbones.base import VideoBackbone
from re2tal.backbones.weights import KeyLayout, each
from re2tal.rewire import (
    Branch,
    CheckpointedModule,
    by_samples,
    checkpointed,
    residual_branches,
    stream_axis,
    why_not_residual,
)
from re2tal.structures import Features

REVNET = KeyLayout("RevNet", r"stages\.0\.0\.f\.0\.conv\.weight", to_ours=each(without=r"head\."))

# The paper's table 1, channels of the stem and of every stage; the three below are for pictures of 32 x 32.
IMAGENET = {"bottleneck": True, "stem": (7, 2), "channels": (128, 512, 1024, 2048, 3328)}
CIFAR: dict = {"bottleneck": False, "stem": (3, 1)}
SIZES: dict[str, dict] = {
    "revnet_nano": CIFAR | {"channels": (8, 8, 16), "depths": (2, 2)},
    "revnet_38": CIFAR | {"channels": (32, 32, 64, 112), "depths": (3, 3, 3)},
    "revnet_110": CIFAR | {"channels": (32, 32, 64, 128), "depths": (9, 9, 9)},
    "revnet_164": CIFAR | {"bottleneck": True, "channels": (32, 128, 256, 512), "depths": (9, 9, 9)},
    "revnet_54": IMAGENET | {"depths": (2, 2, 3, 2)},
    "revnet_104": IMAGENET | {"depths": (2, 2, 11, 2)},
}


class RevNet(VideoBackbone):
    """Pictures of any size, one frame at a time: (B, 3, T, H, W) -> features (B, last channels, T)."""

    def __init__(
        self, *, channels: tuple[int, ...], depths: tuple[int, ...], bottleneck: bool, stem: tuple[int, int]
    ) -> None:
        """Args:
        channels: of the stem and of every stage, both streams together.
        depths: units per stage.
        bottleneck: three convolutions in F and G, the middle one of a quarter of the channels; otherwise two.
        stem: kernel and stride of the first convolution; behind a stride of 2 comes a max pool.
        """
        super().__init__()
        self.out_channels, self.frames_per_step = channels[-1], 1
        self.stem = Stem(channels[0], *stem)
        self.stages = nn.ModuleList()
        for number, ((width, wider), depth) in enumerate(zip(pairwise(channels), depths, strict=True)):
            first = Unit(width, wider, stride=min(2, 1 + number), bottleneck=bottleneck, normed=number > 0)
            others = (Unit(wider, wider, stride=1, bottleneck=bottleneck, normed=True) for _ in range(depth - 1))
            self.stages.append(nn.Sequential(first, *others))
        self.norm = _norm(channels[-1])
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def forward(self, frames: Tensor, mask: Tensor) -> Features:
        """(B, 3, T, H, W) normalised float frames and their (B, T) bool mask -> Features (B, C, T)."""
        x = self.stem(frames.transpose(1, 2).flatten(0, 1))
        for stage in self.stages:
            x = stage(x)
        means = F.relu(self.norm(x)).mean(dim=(2, 3))
        return Features(means.unflatten(0, (len(frames), -1)).transpose(1, 2), mask)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class Stem(CheckpointedModule):
    """A convolution, a norm and ReLU; and a max pool, where the convolution has a stride."""

    def __init__(self, channels: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, channels, kernel, stride, padding=kernel // 2, bias=False)
        self.norm = _norm(channels)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1) if stride > 1 else nn.Identity()

    @checkpointed
    def forward(self, pictures: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, C, H', W')."""
        return self.pool(F.relu(self.norm(self.conv(pictures))))


class Unit(nn.Module):
    """y1 = skip(x1) + F(x2), y2 = skip(x2) + G(y1)."""

    def __init__(self, width: int, wider: int, *, stride: int, bottleneck: bool, normed: bool) -> None:
        """`width` and `wider` are channels in and out, both streams together. F begins with a norm if `normed`."""
        super().__init__()
        self.is_reversible = stride == 1 and width == wider
        width, wider = width // 2, wider // 2
        self.f = _residual(width, wider, stride=stride, bottleneck=bottleneck, normed=normed)
        self.g = _residual(wider, wider, stride=1, bottleneck=bottleneck, normed=True)
        self.skip1, self.skip2 = (
            nn.Identity()
            if self.is_reversible
            else nn.Conv2d(width, wider, 1, stride, bias=False)
            if bottleneck
            else PoolAndPad(wider - width, stride)
            for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', H', W')."""
        x1, x2 = x.chunk(2, dim=1)
        y1 = self.skip1(x1) + self.first(x2)
        return torch.cat((y1, self.skip2(x2) + self.second(y1)), dim=1)

    def first(self, x: Tensor) -> Tensor:
        """F of a stream."""
        return self.f(x)

    def second(self, x: Tensor) -> Tensor:
        """G of a stream."""
        return self.g(x)


class PoolAndPad(nn.Module):
    """Means over squares as wide as the stride, and as many zeros in front of the channels as behind."""

    def __init__(self, more: int, stride: int) -> None:
        super().__init__()
        self.more, self.stride = more, stride

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C + more, H', W'). Odd sizes are rounded up, as convolutions do."""
        x = F.avg_pool2d(x, self.stride, ceil_mode=True)
        return F.pad(x, (0, 0, 0, 0, self.more // 2, self.more - self.more // 2))


class Preactivated(nn.Module):
    """A norm, ReLU and a convolution; without a norm only the convolution."""

    def __init__(self, width: int, wider: int, kernel: int, stride: int, *, normed: bool) -> None:
        super().__init__()
        self.norm = _norm(width) if normed else None
        self.conv = nn.Conv2d(width, wider, kernel, stride, padding=kernel // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', H', W')."""
        return self.conv(x if self.norm is None else F.relu(self.norm(x)))


def _residual(width: int, wider: int, *, stride: int, bottleneck: bool, normed: bool) -> nn.Sequential:
    if not bottleneck:
        first = Preactivated(width, wider, 3, stride, normed=normed)
        return nn.Sequential(first, Preactivated(wider, wider, 3, 1, normed=True))
    inner = wider // 4
    first = Preactivated(width, inner, 1, stride, normed=normed)
    second, third = Preactivated(inner, inner, 3, 1, normed=True), Preactivated(inner, wider, 1, 1, normed=True)
    return nn.Sequential(first, second, third)


@residual_branches.register
def _(block: Unit) -> tuple[Branch, ...]:
    if not block.is_reversible:
        return ()
    # Convolutions reach into their neighbours, so only samples are independent.
    cut = by_samples(inner_states=6)
    return (
        Branch("F", Unit.first, cut=cut, kinks=True),
        Branch("G", Unit.second, cut=cut, kinks=True),
    )


@stream_axis.register
def _(block: Unit) -> int:
    return 1


@why_not_residual.register
def _(block: Unit) -> str:
    return "it changes width or resolution (downsampling)"
