"""ActionFormer (Zhang et al., ECCV 2022): a transformer pyramid whose every step predicts a class and a segment.

    features (B, C, T) -> convolutions -> transformer blocks of stride 1, then 2, 2, ... -> L levels of T / 2**l steps
    -> shared heads: at every step K class logits and the distances to the start and the end of the action

Two public implementations differ numerically; `ActionFormerConfig.variant` says whose numbers to give.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from re2tal.localizers.base import Localizer
from re2tal.localizers.candidates import Candidates, best_of_clip, best_of_each_level
from re2tal.localizers.class_map import ClassMap
from re2tal.localizers.losses import RunningCount, diou_loss, sigmoid_focal_loss
from re2tal.localizers.masked import ChannelNorm, MaskedConv
from re2tal.localizers.pyramid.heads import Head, RegressionHead
from re2tal.localizers.pyramid.points import assign_targets, decode, pyramid_points
from re2tal.localizers.pyramid.step_supervision import step_loss, step_targets
from re2tal.localizers.pyramid.transformer import Encoder, TransformerBlock
from re2tal.structures import Action, Detections, Features, Pyramid, Timeline

Variant = Literal["opentad", "original"]


@dataclass(frozen=True)
class ActionFormerConfig:
    """What an ActionFormer looks like, learns and puts out; the defaults are those of Re2TAL on THUMOS-14."""

    name: Literal["actionformer"] = "actionformer"
    """Which localizer this configures."""
    variant: Variant = "opentad"
    """Whose numbers to give where the public implementations differ. "opentad": padding is blanked again after each
    norm, norms of convolutions add 1e-6, candidates are the best of the whole clip. "original": blanked before the norm
    only, 1e-5, the best of each level. Weights of one give wrong numbers under the other."""
    channels: int = 512
    """Channels of every level; a multiple of `num_heads`."""
    num_heads: int = 4
    """Attention heads."""
    num_embedding_convs: int = 2
    """Convolutions before the first transformer block."""
    num_stem_blocks: int = 2
    """Transformer blocks of stride 1; each further level adds one block of stride 2."""
    num_head_convs: int = 2
    """Convolutions in each head before the one that predicts."""
    kernel_size: int = 3
    """Of the embedding convolutions; odd."""
    attention_window: int | tuple[int | None, ...] | None = None
    """Steps that a step may attend to, itself in the middle: for all levels, or one per level; None is all steps."""
    position_encoding: bool = False
    """Add a sinusoid of the position after the embedding."""
    max_num_steps: int = 512
    """Shorter clips are padded to this length, so that a clip's numbers do not depend on its batch; longer ones are
    padded to a multiple of `step_multiple`. The position encoding is defined on it."""
    regression_ranges: tuple[tuple[float, float], ...] = ((0, 4), (4, 8), (8, 16), (16, 32), (32, 64), (64, 10_000))
    """Per level, finest first: which distances to an action's farther end its points predict, in steps."""
    centre_radius: float = 1.5
    """Only points this close to an action's centre learn it, in strides of their level."""
    label_smoothing: float = 0.0
    """Share of each class target that is spread evenly over the classes and background."""
    regression_weight: float = 1.0
    """Weight of the regression loss in the total."""
    initial_positives: int = 100
    """Both losses are divided by a running mean of the number of positive points per batch; this is its first value."""
    positives_momentum: float = 0.9
    """Share of the running mean that each training step keeps."""
    prior_probability: float = 0.01
    """Score of every class before training."""
    dropout: float = 0.0
    """Dropout on the outputs of attention and MLPs."""
    path_drop: float = 0.1
    """Stochastic depth: share of clips for which a residual branch is skipped in training."""
    step_supervision: float = 0.0
    """Weight of an auxiliary loss in which a linear layer names the actions at every step of the input features. For
    backbones that start from random weights; a pretrained one does without."""
    class_agnostic: bool = False
    """Find actions of the given classes without telling the classes apart; a video classifier may name them later."""
    candidate_min_score: float = 0.001
    """Predictions below go no further; not applied by "opentad" to a single class."""
    candidate_top_k: int = 2000
    """Predictions that go further, per clip ("opentad", unless there is a single class) or per level ("original")."""
    candidate_min_steps: float = 0.0
    """Under "original", segments that are not longer than this go no further."""

    def __post_init__(self) -> None:
        if self.variant not in get_args(Variant):
            raise ValueError(f"unknown variant {self.variant!r}; known: {list(get_args(Variant))}")
        if self.channels % self.num_heads:
            raise ValueError(f"channels={self.channels} must be a multiple of num_heads={self.num_heads}")
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={self.kernel_size} must be odd, or sequences change their length")
        if any(low >= high for low, high in self.regression_ranges):
            raise ValueError(f"regression_ranges={self.regression_ranges} must each be (low, high) with low < high")
        if isinstance(self.attention_window, tuple) and len(self.attention_window) != self.num_levels:
            raise ValueError(
                f"attention_window={self.attention_window} must have one entry per level; there are {self.num_levels}, "
                "one per regression range"
            )
        if any(window is not None and window < 2 for window in self.windows):
            raise ValueError(
                f"attention_window={self.attention_window} must be at least 2 steps, or None for all steps"
            )
        if self.max_num_steps % 2 ** (self.num_levels - 1):
            raise ValueError(
                f"max_num_steps={self.max_num_steps} must be a multiple of {2 ** (self.num_levels - 1)}, the stride of "
                f"the coarsest of {self.num_levels} levels"
            )

    @property
    def num_levels(self) -> int:
        """Levels of the pyramid."""
        return len(self.regression_ranges)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The attention window of each level."""
        if isinstance(self.attention_window, tuple):
            return self.attention_window
        return (self.attention_window,) * self.num_levels

    @property
    def step_multiple(self) -> int:
        """Clips longer than `max_num_steps` are padded to a multiple of this, as the public implementations do.

        It is the largest block of steps that any of their levels cuts its sequence into.
        """
        return max(2**level * (window // 2 * 2 if window else 1) for level, window in enumerate(self.windows))

    def padded_steps(self, num_steps: int) -> int:
        """To which length a clip of `num_steps` is padded."""
        if num_steps <= self.max_num_steps:
            return self.max_num_steps
        return math.ceil(num_steps / self.step_multiple) * self.step_multiple


class ActionFormerOutputs(NamedTuple):
    """Predictions at the P points of all levels, finest level first."""

    logits: Tensor
    """(B, P, K)"""
    offsets: Tensor
    """(B, P, 2) distances to start and end, in strides of the point's level; not negative"""
    points: Tensor
    """(P, 4) float32: step, regression range low and high, stride"""
    mask: Tensor
    """(B, P) bool, True where the point is a real step"""
    step_logits: Tensor
    """(B, K, T) of the auxiliary classifier; empty without step supervision"""


class ActionFormer(Localizer[ActionFormerOutputs]):
    """Encoder, one norm per level, and a classification and a regression head that all levels share."""

    def __init__(self, config: ActionFormerConfig, *, in_channels: int, classes: Sequence[str]) -> None:
        super().__init__()
        self.config = config
        self.in_channels = in_channels
        self.class_map = ClassMap(classes, agnostic=config.class_agnostic)
        self.classes = self.class_map.classes

        opentad = config.variant == "opentad"
        norm_eps = 1e-6 if opentad else 1e-5
        conv = partial(MaskedConv, norm_eps=norm_eps, mask_after_norm=opentad)
        self.encoder = Encoder(
            in_channels,
            channels=config.channels,
            embedding=[partial(conv, kernel_size=config.kernel_size)] * config.num_embedding_convs,
            block=partial(
                TransformerBlock, num_heads=config.num_heads, dropout=config.dropout, path_drop=config.path_drop
            ),
            num_stem_blocks=config.num_stem_blocks,
            windows=config.windows,
            position_steps=config.max_num_steps if config.position_encoding else None,
        )
        self.level_norms = nn.ModuleList(ChannelNorm(config.channels, eps=norm_eps) for _ in config.regression_ranges)
        head_convs = [partial(conv, kernel_size=3)] * config.num_head_convs
        prior = config.prior_probability
        self.classifier = Head(
            config.channels, convs=head_convs, out_channels=len(self.classes), bias=math.log(prior / (1 - prior))
        )
        self.regressor = RegressionHead(config.channels, convs=head_convs, num_levels=config.num_levels)
        self.positives = RunningCount(config.initial_positives, momentum=config.positives_momentum)
        self.step_classifier = nn.Conv1d(in_channels, len(self.classes), 1) if config.step_supervision else None

    def forward(self, features: Features) -> ActionFormerOutputs:
        """Features (B, C, T) of any T -> predictions at all points of the padded clip."""
        num_steps = features.values.shape[-1]
        padding = self.config.padded_steps(num_steps) - num_steps
        pyramid = self.encoder(F.pad(features.values, (0, padding)), F.pad(features.mask, (0, padding)))
        levels = tuple(norm(level) for norm, level in zip(self.level_norms, pyramid.levels, strict=True))
        pyramid = Pyramid(levels, pyramid.masks)
        points = pyramid_points(num_steps + padding, self.config.regression_ranges, device=features.values.device)
        return ActionFormerOutputs(
            torch.cat(self.classifier(pyramid), dim=2).transpose(1, 2),
            torch.cat(self.regressor(pyramid), dim=2).transpose(1, 2),
            points,
            torch.cat(pyramid.masks, dim=1),
            features.values.new_empty(0) if self.step_classifier is None else self.step_classifier(features.values),
        )

    def loss(
        self, outputs: ActionFormerOutputs, actions: Sequence[Sequence[Action]], timelines: Sequence[Timeline]
    ) -> dict[str, Tensor]:
        """ "classification", "regression", with step supervision "steps", each weighted, and their sum "total".

        In training it also updates `positives`.

        Raises ValueError for a label that is not among the classes.
        """
        targets = [
            self._targets(outputs.points, of_clip, timeline)
            for of_clip, timeline in zip(actions, timelines, strict=True)
        ]
        classes, offsets = (torch.stack(column) for column in zip(*targets, strict=True))
        positive = (classes.sum(dim=-1) > 0) & outputs.mask
        num_positive = positive.sum().clamp(min=1)
        divisor = self.positives.update(num_positive) if self.training else num_positive

        smoothing = self.config.label_smoothing
        classes = classes * (1 - smoothing) + smoothing / (len(self.classes) + 1)
        focal = sigmoid_focal_loss(outputs.logits[outputs.mask], classes[outputs.mask])
        classification = focal.sum() / divisor
        diou = diou_loss(outputs.offsets[positive], offsets[positive])
        losses = {"classification": classification, "regression": self.config.regression_weight * diou.sum() / divisor}
        if self.step_classifier is not None:
            losses["steps"] = self.config.step_supervision * self._step_loss(outputs, actions, timelines)
        return losses | {"total": torch.stack(list(losses.values())).sum()}

    @torch.no_grad()
    def detect(self, outputs: ActionFormerOutputs, timelines: Sequence[Timeline]) -> list[Detections]:
        """One Detections per clip, in seconds, not yet suppressed."""
        return [
            Detections(timeline.to_seconds(segments), scores, labels)
            for (segments, scores, labels), timeline in zip(self.candidates(outputs), timelines, strict=True)
        ]

    @torch.no_grad()
    def candidates(self, outputs: ActionFormerOutputs) -> list[Candidates]:
        """What `detect` converts to seconds: one Candidates per clip, in steps, not clipped to the clip."""
        scores, segments = outputs.logits.float().sigmoid(), decode(outputs.points, outputs.offsets)
        return [self._candidates(*clip, outputs.points) for clip in zip(segments, scores, outputs.mask, strict=True)]

    def _candidates(self, segments: Tensor, scores: Tensor, mask: Tensor, points: Tensor) -> Candidates:
        config = self.config
        segments, scores, strides = segments[mask], scores[mask], points[mask, 3]
        if config.variant == "opentad":
            return best_of_clip(segments, scores, min_score=config.candidate_min_score, top_k=config.candidate_top_k)
        return best_of_each_level(
            segments,
            scores,
            strides,
            min_score=config.candidate_min_score,
            top_k=config.candidate_top_k,
            min_steps=config.candidate_min_steps,
        )

    def _step_loss(
        self, outputs: ActionFormerOutputs, actions: Sequence[Sequence[Action]], timelines: Sequence[Timeline]
    ) -> Tensor:
        num_classes, num_steps = outputs.step_logits.shape[1:]
        targets = [
            step_targets(
                *self.class_map.encode(of_clip, timeline, device=outputs.points.device),
                num_steps=num_steps,
                num_classes=num_classes,
            )
            for of_clip, timeline in zip(actions, timelines, strict=True)
        ]
        # The finest level comes first, one point a step.
        return step_loss(outputs.step_logits, torch.stack(targets), outputs.mask[:, :num_steps])

    def _targets(self, points: Tensor, actions: Sequence[Action], timeline: Timeline) -> tuple[Tensor, Tensor]:
        return assign_targets(
            points,
            *self.class_map.encode(actions, timeline, device=points.device),
            num_classes=len(self.classes),
            centre_radius=self.config.centre_radius,
        )
