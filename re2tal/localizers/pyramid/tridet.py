"""TriDet (Shi et al., CVPR 2023), as OpenTAD builds it: convolutions of several widths, and boundaries from histograms.

    block: y = norm(x);  z = instant(y) * relu(overall(mean y)) + (near(y) + wide(y)) * gate(y) + y
           x = x + scale * z;  x = x + scale * mlp(norm(x))
    distance of point t to the start = sum_d d * softmax_d(start logit at t - d + bin d of point t), for each class

Only x is blanked in the padding, so the length that a clip is padded to changes its numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from re2tal.localizers.candidates import best_of_clip
from re2tal.localizers.class_map import ClassMap
from re2tal.localizers.masked import AffineDropPath, ChannelNorm, MaskedConv, blank
from re2tal.localizers.pyramid.assignment import CentreSampling
from re2tal.localizers.pyramid.config import PaddedPyramidConfig
from re2tal.localizers.pyramid.encoder import Encoder
from re2tal.localizers.pyramid.heads import Head, RegressionHead
from re2tal.localizers.pyramid.localizer import PyramidLocalizer, embedding_convs, head_convs, logit
from re2tal.localizers.pyramid.loss import PointLoss
from re2tal.options import COUNT, NOT_NEGATIVE, POSITIVE, RATE, option
from re2tal.structures import Pyramid

Downsampling = Literal["max", "average"]
# As in OpenTAD; not an option there either.
NORM_GROUPS = 16


@dataclass(frozen=True)
class TriDetConfig(PaddedPyramidConfig):
    """What a TriDet looks like, learns and puts out; the defaults are OpenTAD's on THUMOS-14."""

    name: Literal["tridet"] = "tridet"
    """Which localizer this configures; its `channels` are a multiple of 16."""
    num_stem_blocks: int = option(2, within=NOT_NEGATIVE)
    """Blocks of stride 1, whose window is 1; each further level adds one block of stride 2."""
    window: int | tuple[int, ...] = 1
    """Steps that a block's narrow convolutions cover, odd: for all levels, or one per level."""
    wide_ratio: float = option(5.0, within=POSITIVE)
    """The wide convolution covers this many times the window and one, made odd."""
    mlp_channels: int = option(768, within=COUNT)
    """Channels inside the blocks' MLPs."""
    downsampling: Downsampling = "max"
    """How a block of stride 2 halves its input: "max" of three steps, or "average" of two and a linear layer."""
    initial_std: float = option(0.0, within=NOT_NEGATIVE)
    """Of the weights of the blocks' depthwise convolutions before training. At 0, OpenTAD's on THUMOS-14, products of
    two of them have no gradient: such blocks stay MLPs."""
    path_drop: float = option(0.1, within=RATE)
    """Stochastic depth: share of clips for which a residual branch of a strided block is skipped in training."""
    input_noise: float = option(0.0, within=NOT_NEGATIVE)
    """Standard deviation of the noise that is added to the features in training."""
    head_kernel_size: int = option(3, within=COUNT)
    """Of the classification and the regression head; odd."""
    boundary_kernel_size: int = option(3, within=COUNT)
    """Of the heads that find starts and ends; odd."""
    num_bins: int = option(16, within=COUNT)
    """The farthest start or end that a point can predict, in strides of its level."""
    iou_power: float = option(0.2, within=NOT_NEGATIVE)
    """The classification loss of a positive is multiplied by this power of its IoU with the action."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.channels % NORM_GROUPS:
            raise ValueError(f"channels={self.channels} must be a multiple of {NORM_GROUPS}, the groups of its norms")
        if self.downsampling not in get_args(Downsampling):
            raise ValueError(f"unknown downsampling {self.downsampling!r}; known: {list(get_args(Downsampling))}")
        if len(self.windows) != self.num_levels:
            raise ValueError(
                f"window={self.window} must have one entry per level; there are {self.num_levels}, one per regression "
                "range"
            )
        if not all(window >= 1 and window % 2 == 1 for window in self.windows):
            raise ValueError(f"window={self.window} must be odd, or sequences change their length")
        for name in ("head_kernel_size", "boundary_kernel_size"):
            if getattr(self, name) % 2 == 0:
                raise ValueError(f"{name}={getattr(self, name)} must be odd, or sequences change their length")

    @property
    def windows(self) -> tuple[int, ...]:
        """The window of each level; that of the finest counts for `step_multiple` only."""
        return self.window if isinstance(self.window, tuple) else (self.window,) * self.num_levels

    @property
    def step_multiple(self) -> int:
        """The longest span that a level's window covers, as OpenTAD pads, and a whole number of coarsest strides."""
        longest = max(2**level * window for level, window in enumerate(self.windows))
        return math.lcm(longest, 2 ** (self.num_levels - 1))


class SGPBlock(nn.Module):
    """Scalable-granularity perception: see the head of this file. Optionally halves T; T must be even then."""

    def __init__(
        self,
        channels: int,
        *,
        stride: int,
        window: int,
        wide_ratio: float,
        mlp_channels: int,
        downsampling: Downsampling,
        initial_std: float,
        path_drop: float | None,
    ) -> None:
        """`path_drop` None: the residual branches have no learned scale."""
        super().__init__()
        self.stride = stride
        self.pool = _pool(channels, downsampling) if stride > 1 else nn.Identity()
        self.norm = ChannelNorm(channels)
        # Odd, or the sequence would change its length.
        wide = round((window + 1) * wide_ratio) // 2 * 2 + 1
        self.instant, self.overall, self.near, self.gate, self.wide = (
            nn.Conv1d(channels, channels, size, padding=size // 2, groups=channels)
            for size in (1, 1, window, window, wide)
        )
        for conv in (self.instant, self.overall, self.near, self.gate, self.wide):
            nn.init.normal_(conv.weight, std=initial_std)
            assert conv.bias is not None
            nn.init.zeros_(conv.bias)
        self.mlp_norm = nn.GroupNorm(NORM_GROUPS, channels)
        self.mlp = nn.Sequential(nn.Conv1d(channels, mlp_channels, 1), nn.GELU(), nn.Conv1d(mlp_channels, channels, 1))
        self.path, self.mlp_path = (
            nn.Identity() if path_drop is None else AffineDropPath(channels, drop=path_drop) for _ in range(2)
        )

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, T), (B, T) -> the same with T / stride steps; not blank in the padding."""
        # Before the norm, which sees the halved sequence.
        x, mask = self.pool(x), mask[:, :: self.stride]
        y = self.norm(x)
        overall = torch.relu(self.overall(y.mean(dim=2, keepdim=True)))
        y = self.instant(y) * overall + (self.near(y) + self.wide(y)) * self.gate(y) + y
        # `y` is not blanked, as in OpenTAD: see the head of this file.
        x = blank(x, mask) + self.path(y)
        return x + self.mlp_path(self.mlp(self.mlp_norm(x))), mask


def _pool(channels: int, downsampling: Downsampling) -> nn.Module:
    if downsampling == "max":
        return nn.MaxPool1d(3, stride=2, padding=1)
    return nn.Sequential(nn.AvgPool1d(2), nn.Conv1d(channels, channels, 1))


class TridentHead(RegressionHead):
    """Distances as expectations over bins of whole strides; `starts` and `ends` send no gradient into the pyramid."""

    class_layers = ("starts.output", "ends.output")
    """Layers with a row per class."""

    def __init__(
        self,
        channels: int,
        *,
        convs: Sequence[MaskedConv],
        num_levels: int,
        num_bins: int,
        kernel_size: int,
        starts: Head,
        ends: Head,
    ) -> None:
        # Distances 0 .. num_bins, to the start and to the end.
        bins = 2 * (num_bins + 1)
        super().__init__(channels, convs=convs, num_levels=num_levels, out_channels=bins, kernel_size=kernel_size)
        self.starts = starts
        self.ends = ends

    def forward(self, pyramid: Pyramid) -> Tensor:
        """L levels (B, C, T_l) -> distances to start and end in strides, per class: (B, P, K, 2)."""
        # The boundary heads learn from the pyramid, and do not teach it, as in OpenTAD.
        apart = pyramid._replace(levels=tuple(level.detach() for level in pyramid.levels))
        parts = zip(self.levels(pyramid), self.starts.levels(apart), self.ends.levels(apart), strict=True)
        return torch.cat([expected_distances(*level) for level in parts], dim=1)


def expected_distances(bins: Tensor, starts: Tensor, ends: Tensor) -> Tensor:
    """One level's bins (B, 2 * (N + 1), T), first those to the start, and logits (B, K, T), twice -> (B, T, K, 2).

    The start at distance d lies d steps before the point, the end d steps behind it; there is nothing, a logit of 0,
    beyond the level. In float32 or better.
    """
    bins, starts, ends = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (bins, starts, ends))
    farthest = bins.shape[1] // 2 - 1
    # (B, K, T, N + 1): index j of `before` is distance N - j, of `behind` distance j.
    before = F.pad(starts, (farthest, 0)).unfold(2, farthest + 1, 1)
    behind = F.pad(ends, (0, farthest)).unfold(2, farthest + 1, 1)
    to_start, to_end = bins.transpose(1, 2)[:, None].chunk(2, dim=3)
    distance = torch.arange(farthest + 1, device=bins.device, dtype=bins.dtype)
    left = (before + to_start).softmax(dim=3) @ distance.flip(0)
    right = (behind + to_end).softmax(dim=3) @ distance
    return torch.stack([left, right], dim=3).transpose(1, 2)


class InputNoise(nn.Module):
    """Adds normal noise of this standard deviation in training."""

    def __init__(self, std: float) -> None:
        super().__init__()
        self.std = std

    def forward(self, x: Tensor) -> Tensor:
        """x, of any shape."""
        # Nothing is drawn at 0: a draw would move the generator of all that comes after.
        return x + self.std * torch.randn_like(x) if self.training and self.std > 0 else x


def tridet(config: TriDetConfig, *, in_channels: int, classes: Sequence[str]) -> PyramidLocalizer:
    """The TriDet that `config` describes."""
    conv = partial(MaskedConv, norm_eps=1e-6, mask_after_norm=True)
    block = partial(
        SGPBlock,
        config.channels,
        wide_ratio=config.wide_ratio,
        mlp_channels=config.mlp_channels,
        downsampling=config.downsampling,
        initial_std=config.initial_std,
    )
    class_map = ClassMap(classes, agnostic=config.class_agnostic)
    num_classes = len(class_map.classes)

    def head(kernel_size: int, bias: float = 0.0) -> Head:
        convs = head_convs(config, conv, kernel_size=kernel_size)
        return Head(config.head_width, convs=convs, out_channels=num_classes, kernel_size=kernel_size, bias=bias)

    return PyramidLocalizer(
        config,
        in_channels=in_channels,
        class_map=class_map,
        encoder=Encoder(
            config.channels,
            disturb=InputNoise(config.input_noise),
            embedding=embedding_convs(config, in_channels, conv),
            stem=[block(stride=1, window=1, path_drop=None) for _ in range(config.num_stem_blocks)],
            branch=[block(stride=2, window=window, path_drop=config.path_drop) for window in config.windows[1:]],
            position_steps=config.max_num_steps if config.position_encoding else None,
        ),
        level_norms=[ChannelNorm(config.channels, eps=1e-6) for _ in config.regression_ranges],
        classifier=head(config.head_kernel_size, bias=logit(config.prior_probability)),
        regressor=TridentHead(
            config.head_width,
            convs=head_convs(config, conv, kernel_size=config.head_kernel_size),
            num_levels=config.num_levels,
            num_bins=config.num_bins,
            kernel_size=config.head_kernel_size,
            starts=head(config.boundary_kernel_size),
            ends=head(config.boundary_kernel_size),
        ),
        assign=CentreSampling(config.centre_radius),
        point_loss=PointLoss(
            config.label_smoothing, config.regression_weight, stored_count=True, iou_power=config.iou_power
        ),
        choose=partial(best_of_clip, min_score=config.candidate_min_score, top_k=config.candidate_top_k),
    )
