"""TemporalMaxer (Tang et al., 2023), as OpenTAD builds it: a pyramid of max pools, without weights of its own.

A level's step is real where any of the three steps that it pools is. The original release takes every second step's
mask instead, so an even number of real steps gives it one less per level.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import torch.nn.functional as F
from torch import Tensor, nn

from re2tal.localizers.candidates import best_of_clip
from re2tal.localizers.class_map import ClassMap
from re2tal.localizers.masked import ChannelNorm, MaskedConv, blank
from re2tal.localizers.pyramid.assignment import SimOTA
from re2tal.localizers.pyramid.config import PyramidConfig
from re2tal.localizers.pyramid.encoder import Encoder
from re2tal.localizers.pyramid.heads import Head, RegressionHead
from re2tal.localizers.pyramid.localizer import PyramidLocalizer, embedding_convs, head_convs, logit
from re2tal.localizers.pyramid.loss import PointLoss
from re2tal.options import COUNT, NOT_NEGATIVE, RATE, SHARE, option

LevelNorm = Literal["layer", "group", "none"]


@dataclass(frozen=True)
class TemporalMaxerConfig(PyramidConfig):
    """What a TemporalMaxer looks like, learns and puts out; the defaults are OpenTAD's on THUMOS-14."""

    name: Literal["temporalmaxer"] = "temporalmaxer"
    """Which localizer this configures."""
    level_norm: LevelNorm = "group"
    """What normalises each level before the heads: "layer" each step over its channels, "group" the whole level in
    groups of channels, "none" nothing."""
    level_norm_groups: int = option(4, within=COUNT)
    """Groups of a level norm of kind "group"; `channels` is a multiple of it."""
    level_norm_affine: bool = False
    """A level norm of kind "group" learns a scale and a shift per channel."""
    input_dropout: float = option(0.2, within=RATE)
    """Share of the features' channels that are zeroed in training, each for a whole clip."""
    match_class_weight: float = option(1.0, within=NOT_NEGATIVE)
    """Of the classification in the cost by which points and actions are matched."""
    match_iou_weight: float = option(2.0, within=NOT_NEGATIVE)
    """Of the overlap in that cost."""
    match_keep_share: float = option(1.0, within=SHARE)
    """Share of the points inside an action, the cheapest, that count in full."""
    match_confused_weight: float = option(0.0, within=SHARE)
    """What the other points inside an action count."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.level_norm not in get_args(LevelNorm):
            raise ValueError(f"unknown level_norm {self.level_norm!r}; known: {list(get_args(LevelNorm))}")
        if self.level_norm == "group" and self.channels % self.level_norm_groups:
            raise ValueError(
                f"channels={self.channels} must be a multiple of level_norm_groups={self.level_norm_groups}"
            )


class MaxPool(nn.Module):
    """Halves a sequence; its three steps of which any is real give a real one."""

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, T), (B, T) -> the same with ceil(T / 2) steps. In the padding x is zero and nowhere less."""
        # Pooling pads with minus infinity, and has no kernel for bools.
        mask = F.max_pool1d(mask.float(), 3, stride=2, padding=1) > 0
        return blank(F.max_pool1d(x, 3, stride=2, padding=1), mask), mask


def temporalmaxer(config: TemporalMaxerConfig, *, in_channels: int, classes: Sequence[str]) -> PyramidLocalizer:
    """The TemporalMaxer that `config` describes."""
    conv = partial(MaskedConv, norm_eps=1e-6, mask_after_norm=True)
    class_map = ClassMap(classes, agnostic=config.class_agnostic)
    return PyramidLocalizer(
        config,
        in_channels=in_channels,
        class_map=class_map,
        encoder=Encoder(
            config.channels,
            disturb=nn.Dropout1d(config.input_dropout),
            embedding=embedding_convs(config, in_channels, conv),
            branch=[MaxPool() for _ in config.regression_ranges[1:]],
        ),
        level_norms=[_level_norm(config) for _ in config.regression_ranges],
        classifier=Head(
            config.head_width,
            convs=head_convs(config, conv),
            out_channels=len(class_map.classes),
            bias=logit(config.prior_probability),
        ),
        regressor=RegressionHead(config.head_width, convs=head_convs(config, conv), num_levels=config.num_levels),
        assign=SimOTA(
            config.centre_radius,
            class_weight=config.match_class_weight,
            iou_weight=config.match_iou_weight,
            keep_share=config.match_keep_share,
            confused_weight=config.match_confused_weight,
        ),
        point_loss=PointLoss(config.label_smoothing, config.regression_weight, stored_count=True),
        choose=partial(best_of_clip, min_score=config.candidate_min_score, top_k=config.candidate_top_k),
    )


def _level_norm(config: TemporalMaxerConfig) -> nn.Module:
    match config.level_norm:
        case "layer":
            return ChannelNorm(config.channels, eps=1e-6)
        case "group":
            return nn.GroupNorm(config.level_norm_groups, config.channels, affine=config.level_norm_affine)
        case "none":
            return nn.Identity()
