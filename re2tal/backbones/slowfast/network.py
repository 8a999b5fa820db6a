"""SlowFast (Feichtenhofer et al., ICCV 2019): a wide ResNet on few frames, a thin one on many, joined by laterals.

    slow  every tau-th frame          stem -> (+) -> layer1 -> (+) -> layer2 -> (+) -> layer3 -> (+) -> layer4
                                               ^               ^                ^                ^
    fast  every (tau / alpha)-th      stem -> / -> layer1 -> / ..., fast channels = slow channels / beta

The joint features are the spatial means of both, slow channels first, each resampled to one step per `frames_per_step`
frames as Re2TAL does it (linear, sample centres). Parameter names are mmaction2's; its laterals have neither norm nor
activation, those of pytorchvideo have both.

Rewired, a stage's first block (it changes the width) stays an ordinary block, and ReLU moves from behind the addition
into the branch, so that what is added can be subtracted again: x + relu(F(x)) instead of relu(x + F(x)). That changes
the function: such a network must be fine-tuned from recognition weights before it is of use.
"""

from __future__ import annotations

import re
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from re2tal.backbones.base import BackboneConfig, VideoBackbone, steps_mask
from re2tal.backbones.slowfast.layouts import KEY_LAYOUTS
from re2tal.backbones.weights import load_weights
from re2tal.reversible.recompute import cat_with_recipe
from re2tal.rewire import Branch, CheckpointedModule, by_samples, checkpointed, residual_branches, why_not_residual
from re2tal.rewire.nonresidual import recomputed
from re2tal.structures import Features

EXPANSION = 4  # output channels of a bottleneck, by its inner ones

# Convolutions reach into their neighbours, so only samples are independent. The number is measured.
CUT = by_samples(inner_states=4)


class SlowFast(VideoBackbone):
    """SlowFast of any depth: (B, 3, T, H, W) -> features (B, slow + fast channels, ceil(T / frames_per_step)).

    A T that is not a multiple of `slow_stride` is padded with zeros at the end; features of the padding are cut off.
    """

    def __init__(
        self,
        *,
        depths: tuple[int, int, int, int],
        base_channels: int = 64,
        slow_stride: int = 4,
        speed_ratio: int = 4,
        channel_ratio: int = 8,
        fusion_kernel: int = 7,
        lateral_norm: bool = False,
        frames_per_step: int = 2,
        block: type[Bottleneck],
    ) -> None:
        """Args:
        depths: bottlenecks per stage; (3, 4, 6, 3) is R50, (3, 4, 23, 3) is R101.
        base_channels: inner channels of the slow pathway's first stage.
        slow_stride: the paper's tau, in frames of the input.
        speed_ratio: the paper's alpha, how many times as many frames the fast pathway sees.
        channel_ratio: the paper's 1 / beta, how many times as few channels it has.
        fusion_kernel: length of the lateral convolutions, in frames of the fast pathway.
        lateral_norm: whether batch norm and ReLU follow them, as in pytorchvideo.
        frames_per_step: how many frames one step of the features stands for; it divides `slow_stride`.
        block: `Bottleneck`, or `InnerReluBottleneck` for a network whose branches are to be rewired.
        """
        super().__init__()
        if slow_stride % speed_ratio or slow_stride % frames_per_step:
            raise ValueError(
                f"SlowFast's slow_stride {slow_stride} must be a multiple of speed_ratio {speed_ratio} and of "
                f"frames_per_step {frames_per_step}"
            )
        if base_channels % channel_ratio:
            raise ValueError(f"SlowFast's base_channels {base_channels} do not divide by channel_ratio {channel_ratio}")
        self.slow_stride, self.fast_stride = slow_stride, slow_stride // speed_ratio
        self.frames_per_step = frames_per_step
        fast_channels = base_channels // channel_ratio
        fast_widths = [fast_channels, *(fast_channels * EXPANSION * 2**index for index in range(3))]
        lateral = NormedLateral if lateral_norm else Lateral
        laterals = [lateral(width, 2 * width, kernel=fusion_kernel, stride=speed_ratio) for width in fast_widths]
        self.slow_path = Pathway(
            base_channels, depths=depths, kernels=(1, 1, 3, 3), stem_kernel=1, laterals=laterals, block=block
        )
        self.fast_path = Pathway(
            fast_channels, depths=depths, kernels=(3, 3, 3, 3), stem_kernel=5, laterals=[], block=block
        )
        self.fast_out_channels = fast_channels * EXPANSION * 8
        self.out_channels = base_channels * EXPANSION * 8 + self.fast_out_channels
        self.apply(_initialise)

    def forward(self, frames: Tensor, mask: Tensor) -> Features:
        """(B, 3, T, H, W) normalised float frames and their (B, T) bool mask -> Features (B, C, T')."""
        num_frames = frames.shape[2]
        if padding := -num_frames % self.slow_stride:  # torch would copy for a padding of nothing too
            frames = F.pad(frames, (0, 0, 0, 0, 0, padding))
        steps = frames.shape[2] // self.frames_per_step
        slow, fast = self.pathways(frames)
        means = (F.interpolate(x.mean(dim=(3, 4)), size=steps, mode="linear") for x in (slow, fast))
        mask = steps_mask(mask, frames_per_step=self.frames_per_step)
        return Features(torch.cat(list(means), dim=1)[:, :, : mask.shape[1]], mask)

    def pathways(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, T, H, W), T a multiple of `slow_stride` -> slow (B, C, T / tau, H', W'), fast (B, c, T', H', W')."""
        slow = self.slow_path.stem(frames[:, :, :: self.slow_stride])
        fast = self.fast_path.stem(frames[:, :, :: self.fast_stride])
        stages = zip(self.slow_path.laterals(), self.slow_path.layers(), self.fast_path.layers(), strict=True)
        for lateral, slow_layer, fast_layer in stages:
            slow = slow_layer(cat_with_recipe([slow, lateral(fast)], dim=1))
            fast = fast_layer(fast)
        return slow, fast


def _initialise(module: nn.Module) -> None:
    # No norm starts at zero, as is usual at the end of a residual branch: behind it comes a ReLU, which has no gradient
    # at zero, so that a rewired branch would never wake up.
    if isinstance(module, nn.Conv3d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class Pathway(CheckpointedModule):
    """A 3-D ResNet: conv1, maxpool, layer1 to layer4, and the laterals in front of them; `SlowFast` calls them."""

    def __init__(
        self,
        channels: int,
        *,
        depths: tuple[int, ...],
        kernels: tuple[int, ...],
        stem_kernel: int,
        laterals: list[Lateral],
        block: type[Bottleneck],
    ) -> None:
        """Args:
        channels: inner channels of the first stage; they double from stage to stage.
        depths: bottlenecks per stage.
        kernels: per stage, how many frames its first convolutions span.
        stem_kernel: how many frames conv1 spans.
        laterals: per stage, what is concatenated to its input; none for a pathway that receives nothing.
        """
        super().__init__()
        self.conv1 = ConvNorm(3, channels, kernel=(stem_kernel, 7, 7), stride=2, relu=True)
        self.maxpool = nn.MaxPool3d((1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1))
        width = channels
        for index, (depth, kernel) in enumerate(zip(depths, kernels, strict=True)):
            if laterals:
                self.add_module("conv1_lateral" if index == 0 else f"layer{index}_lateral", laterals[index])
                width += laterals[index].conv.out_channels
            inner, stride = channels * 2**index, 1 if index == 0 else 2
            blocks = [block(width, inner, kernel=kernel, stride=stride, downsample=True)]
            width = inner * EXPANSION
            blocks += [block(width, inner, kernel=kernel, stride=1, downsample=False) for _ in range(depth - 1)]
            self.add_module(f"layer{index + 1}", nn.Sequential(*blocks))

    def stem(self, frames: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> (B, C, T, H / 4, W / 4)."""
        if not (self.checkpointing and torch.is_grad_enabled()):
            return self.maxpool(self.conv1(frames))
        # Not of the whole pathway, whose stages change while they run.
        layers = nn.Sequential(self.conv1, self.maxpool)
        return recomputed(layers, frames, owner=layers)

    def layers(self) -> list[nn.Module]:
        """The stages as they are now: rewiring replaces them."""
        return [child for name, child in self.named_children() if re.fullmatch(r"layer\d", name)]

    def laterals(self) -> list[nn.Module]:
        """In the order of the stages in front of which they stand."""
        return [child for name, child in self.named_children() if name.endswith("_lateral")]


class Lateral(CheckpointedModule):
    """Fast features at the slow pathway's rate: a convolution in time alone."""

    def __init__(self, in_channels: int, out_channels: int, *, kernel: int, stride: int) -> None:
        super().__init__()
        padding = ((kernel - 1) // 2, 0, 0)
        self.conv = nn.Conv3d(in_channels, out_channels, (kernel, 1, 1), (stride, 1, 1), padding, bias=False)

    @checkpointed
    def forward(self, x: Tensor) -> Tensor:
        """(B, c, T, H, W) -> (B, C, T / stride, H, W)."""
        return self.conv(x)


class NormedLateral(Lateral):
    """The same with batch norm and ReLU behind it."""

    def __init__(self, in_channels: int, out_channels: int, *, kernel: int, stride: int) -> None:
        super().__init__(in_channels, out_channels, kernel=kernel, stride=stride)
        self.bn = nn.BatchNorm3d(out_channels)

    @checkpointed
    def forward(self, x: Tensor) -> Tensor:
        """(B, c, T, H, W) -> (B, C, T / stride, H, W)."""
        return F.relu_(self.bn(self.conv(x)))


class ConvNorm(nn.Module):
    """Convolution (stride in space only, same padding), batch norm, and ReLU where asked for."""

    def __init__(
        self, in_channels: int, out_channels: int, *, kernel: tuple[int, int, int], stride: int = 1, relu: bool
    ) -> None:
        super().__init__()
        padding = (kernel[0] // 2, kernel[1] // 2, kernel[2] // 2)
        self.conv = nn.Conv3d(in_channels, out_channels, kernel, (1, stride, stride), padding, bias=False)
        self.bn = nn.BatchNorm3d(out_channels)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, C', T, H / stride, W / stride)."""
        x = self.bn(self.conv(x))
        return F.relu_(x) if self.relu else x


class Bottleneck(nn.Module):
    """As pretrained: relu(skip(x) + F(x)), where skip is the identity or a downsampling."""

    def __init__(self, in_channels: int, inner: int, *, kernel: int, stride: int, downsample: bool) -> None:
        super().__init__()
        out_channels = inner * EXPANSION
        self.conv1 = ConvNorm(in_channels, inner, kernel=(kernel, 1, 1), relu=True)
        self.conv2 = ConvNorm(inner, inner, kernel=(1, 3, 3), stride=stride, relu=True)
        self.conv3 = ConvNorm(inner, out_channels, kernel=(1, 1, 1), relu=False)
        shortcut = partial(ConvNorm, in_channels, out_channels, kernel=(1, 1, 1), stride=stride, relu=False)
        self.downsample = shortcut() if downsample else None

    def body(self, x: Tensor) -> Tensor:
        """F: (B, C, T, H, W) -> (B, C', T, H', W')."""
        return self.conv3(self.conv2(self.conv1(x)))

    def skip(self, x: Tensor) -> Tensor:
        """What F's output is added to."""
        return x if self.downsample is None else self.downsample(x)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, C', T, H', W')."""
        return F.relu_(self.body(x) + self.skip(x))

    def change(self, x: Tensor) -> Tensor:
        """What the block as a whole changes, relu(x + F(x)) - x."""
        return F.relu_(self.body(x) + x) - x


class InnerReluBottleneck(Bottleneck):
    """As Re2TAL rewires it: skip(x) + relu(F(x)), also where skip is a downsampling."""

    def branch(self, x: Tensor) -> Tensor:
        """What is added to x."""
        return F.relu_(self.body(x))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, C', T, H', W')."""
        return self.branch(x) + self.skip(x)


@residual_branches.register
def _(block: Bottleneck) -> tuple[Branch, ...]:
    branch = Branch("bottleneck and its ReLU, less x", Bottleneck.change, cut=CUT, kinks=True)
    return (branch,) if block.downsample is None else ()


@residual_branches.register
def _(block: InnerReluBottleneck) -> tuple[Branch, ...]:
    branch = Branch("bottleneck", InnerReluBottleneck.branch, cut=CUT, kinks=True)
    return (branch,) if block.downsample is None else ()


@why_not_residual.register
def _(block: Bottleneck) -> str:
    return "it changes width or resolution (downsampling)"


@why_not_residual.register
def _(lateral: Lateral) -> str:
    return "they lead from the fast pathway to the slow one (lateral)"


# Depths and rates of the paper: "8x8" is 8 slow frames out of 64, which a clip of 32 frames, every second one, reaches
# with tau 4. The last two rows are for pytorchvideo's weights.
SIZES: dict[str, dict] = {
    "slowfast_nano": {"depths": (2, 2, 2, 2), "base_channels": 16, "channel_ratio": 4},
    "slowfast_r50_4x16": {"depths": (3, 4, 6, 3), "slow_stride": 8, "speed_ratio": 8, "fusion_kernel": 5},
    "slowfast_r50_8x8": {"depths": (3, 4, 6, 3)},
    "slowfast_r101_4x16": {"depths": (3, 4, 23, 3), "slow_stride": 8, "speed_ratio": 8, "fusion_kernel": 5},
    "slowfast_r101_8x8": {"depths": (3, 4, 23, 3)},
    "slowfast_r50_8x8_pytorchvideo": {"depths": (3, 4, 6, 3), "lateral_norm": True},
    "slowfast_r101_8x8_pytorchvideo": {"depths": (3, 4, 23, 3), "fusion_kernel": 5, "lateral_norm": True},
}


def build_slowfast(config: BackboneConfig) -> SlowFast:
    """The size that `config.name` names, random or from `config.weights`; ReLU inside if its branches are rewired."""
    if config.drop_path:
        raise ValueError(f"{config.name} has no drop-path, but backbone.drop_path is {config.drop_path}; set it to 0")
    block = InnerReluBottleneck if config.rewired and config.unit == "branch" else Bottleneck
    slowfast = SlowFast(**SIZES[config.name], frames_per_step=config.frames_per_step or 2, block=block)
    if config.weights is not None:
        load_weights(slowfast, config.weights, layouts=KEY_LAYOUTS)
    return slowfast
