"""ActionFormer (Zhang et al., ECCV 2022): a pyramid of transformer blocks.

Two public implementations differ numerically; `ActionFormerConfig.variant` says whose numbers to give.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

from torch import nn

from re2tal.localizers.candidates import best_of_clip, best_of_each_level
from re2tal.localizers.class_map import ClassMap
from re2tal.localizers.masked import ChannelNorm, MaskedConv
from re2tal.localizers.pyramid.assignment import CentreSampling
from re2tal.localizers.pyramid.config import PaddedPyramidConfig
from re2tal.localizers.pyramid.encoder import Encoder
from re2tal.localizers.pyramid.heads import Head, RegressionHead
from re2tal.localizers.pyramid.localizer import PyramidLocalizer, embedding_convs, head_convs, logit
from re2tal.localizers.pyramid.loss import PointLoss
from re2tal.localizers.pyramid.transformer import TransformerBlock
from re2tal.options import COUNT, NOT_NEGATIVE, RATE, option

Variant = Literal["opentad", "original"]


@dataclass(frozen=True)
class ActionFormerConfig(PaddedPyramidConfig):
    """What an ActionFormer looks like, learns and puts out; the defaults are those of Re2TAL on THUMOS-14."""

    name: Literal["actionformer"] = "actionformer"
    """Which localizer this configures."""
    variant: Variant = "opentad"
    """Whose numbers to give where the public implementations differ. "opentad": padding is blanked again after each
    norm, norms of convolutions add 1e-6, candidates are the best of the whole clip. "original": blanked before the norm
    only, 1e-5, the `candidate_top_k` best of each level. Weights of one give wrong numbers under the other."""
    num_heads: int = option(4, within=COUNT)
    """Attention heads; `channels` is a multiple of it."""
    num_stem_blocks: int = option(2, within=NOT_NEGATIVE)
    """Transformer blocks of stride 1; each further level adds one block of stride 2."""
    attention_window: int | tuple[int | None, ...] | None = None
    """Steps that a step may attend to, itself in the middle: for all levels, or one per level; None is all steps."""
    dropout: float = option(0.0, within=RATE)
    """Dropout on the outputs of attention and MLPs."""
    path_drop: float = option(0.1, within=RATE)
    """Stochastic depth: share of clips for which a residual branch is skipped in training."""
    input_dropout: float = option(0.0, within=RATE)
    """Share of the features' channels that are zeroed in training, each for a whole clip."""
    candidate_min_steps: float = option(0.0, within=NOT_NEGATIVE)
    """Under "original", segments that are not longer than this go no further."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant not in get_args(Variant):
            raise ValueError(f"unknown variant {self.variant!r}; known: {list(get_args(Variant))}")
        if self.channels % self.num_heads:
            raise ValueError(f"channels={self.channels} must be a multiple of num_heads={self.num_heads}")
        if isinstance(self.attention_window, tuple) and len(self.attention_window) != self.num_levels:
            raise ValueError(
                f"attention_window={self.attention_window} must have one entry per level; there are {self.num_levels}, "
                "one per regression range"
            )
        if any(window is not None and window < 2 for window in self.windows):
            raise ValueError(
                f"attention_window={self.attention_window} must be at least 2 steps, or None for all steps"
            )

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The attention window of each level."""
        if isinstance(self.attention_window, tuple):
            return self.attention_window
        return (self.attention_window,) * self.num_levels

    @property
    def step_multiple(self) -> int:
        """The largest block of steps that any level of the public implementations cuts its sequence into."""
        # An attention window of w steps is cut into blocks of 2 * (w // 2).
        return max(2**level * (window // 2 * 2 if window else 1) for level, window in enumerate(self.windows))


def actionformer(config: ActionFormerConfig, *, in_channels: int, classes: Sequence[str]) -> PyramidLocalizer:
    """The ActionFormer that `config` describes."""
    opentad = config.variant == "opentad"
    channels, norm_eps = config.channels, 1e-6 if opentad else 1e-5
    conv = partial(MaskedConv, norm_eps=norm_eps, mask_after_norm=opentad)
    block = partial(
        TransformerBlock, channels, num_heads=config.num_heads, dropout=config.dropout, path_drop=config.path_drop
    )
    class_map = ClassMap(classes, agnostic=config.class_agnostic)
    choose = best_of_clip if opentad else partial(best_of_each_level, min_steps=config.candidate_min_steps)
    return PyramidLocalizer(
        config,
        in_channels=in_channels,
        class_map=class_map,
        encoder=Encoder(
            channels,
            embedding=embedding_convs(config, in_channels, conv),
            # In the order of the data: weights are drawn as the parts are built, and a seed gives the same ones only in
            # this order.
            stem=[block(stride=1, window=config.windows[0]) for _ in range(config.num_stem_blocks)],
            branch=[block(stride=2, window=window) for window in config.windows[1:]],
            disturb=nn.Dropout1d(config.input_dropout) if config.input_dropout else None,
            position_steps=config.max_num_steps if config.position_encoding else None,
        ),
        level_norms=[ChannelNorm(channels, eps=norm_eps) for _ in config.regression_ranges],
        classifier=Head(
            config.head_width,
            convs=head_convs(config, conv),
            out_channels=len(class_map.classes),
            # Nearly all points are background: at 0.5, their loss would drown that of the positives in the first steps
            # (Lin et al.).
            bias=logit(config.prior_probability),
        ),
        regressor=RegressionHead(config.head_width, convs=head_convs(config, conv), num_levels=config.num_levels),
        assign=CentreSampling(config.centre_radius),
        point_loss=PointLoss(config.label_smoothing, config.regression_weight),
        choose=partial(choose, min_score=config.candidate_min_score, top_k=config.candidate_top_k),
    )
