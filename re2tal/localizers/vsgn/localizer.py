"""VSGN (Zhao et al., ICCV 2021), as OpenTAD builds it: anchors on a pyramid, refined at their boundaries.

    features (B, C, T) -> encoder -> decoder -> every anchor: class and segment -> boundaries moved
                                             -> every step: does an action start, end, go on here?

A detection's score is its class's, times how much a start its start is, times how much an end its end is. The cutting
and magnifying of short actions (video self-stitching) belongs to the data, not to this network, and is not done.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from re2tal.localizers.base import Localizer
from re2tal.localizers.candidates import Candidates, best_of_clip
from re2tal.localizers.class_map import ClassMap
from re2tal.localizers.losses import RunningCount, focal_of_chosen
from re2tal.localizers.vsgn.anchors import (
    Matches,
    balanced_bce,
    decode,
    evaluation_targets,
    giou_loss,
    match,
    pyramid_anchors,
)
from re2tal.localizers.vsgn.network import AnchorHead, BoundaryHead, EvaluationHead, PyramidDecoder, PyramidEncoder
from re2tal.structures import Action, Detections, Features, Timeline


@dataclass(frozen=True)
class VSGNConfig:
    """What a VSGN looks like, learns and puts out; the defaults are OpenTAD's on THUMOS-14."""

    name: Literal["vsgn"] = "vsgn"
    """Which localizer this configures."""
    channels: int = 256
    """Channels of every level; a multiple of `num_groups`."""
    num_groups: int = 32
    """Groups of the heads' group normalisation."""
    num_levels: int = 5
    """Levels of the pyramid, each half as long as the one before."""
    first_stride: int = 4
    """Steps of the features per step of the finest level; even."""
    num_neighbours: int | None = 10
    """Nearest steps in the encoder's graph convolutions; None encodes by plain convolutions."""
    num_head_convs: int = 4
    """Convolutions in each anchor head before the one that predicts."""
    anchor_scales: tuple[float, ...] = (1.0, 1.5)
    """Lengths of the anchors at each position, in strides of their level."""
    anchor_iou: float = 0.5
    """From this IoU with an action on, an anchor, or what it decodes to, must predict it."""
    boundary_iou: float = 0.7
    """From this IoU with an action on, a decoded segment learns to move its boundaries."""
    focal_alpha: float = 0.35
    """Weight of positives in the focal loss, which is used when there is a single class."""
    initial_positives: int = 100
    """Losses are divided by running means of the numbers of positives per batch; this is their first value."""
    positives_momentum: float = 0.9
    """Share of the running means that each training step keeps."""
    class_agnostic: bool = False
    """Find actions of the given classes without telling the classes apart; a video classifier may name them later."""
    candidate_min_score: float = 0.001
    """Predictions below go no further; not applied to a single class."""
    candidate_top_k: int = 2000
    """Predictions per clip that go further; all of them with a single class."""

    def __post_init__(self) -> None:
        if self.channels % self.num_groups:
            raise ValueError(f"channels={self.channels} must be a multiple of num_groups={self.num_groups}")
        if self.first_stride < 2 or self.first_stride % 2:
            raise ValueError(f"first_stride={self.first_stride} must be even: the first level halves the stem's output")

    @property
    def strides(self) -> tuple[int, ...]:
        """Steps of the features per step of each level, finest first."""
        return tuple(self.first_stride * 2**level for level in range(self.num_levels))


class VSGNOutputs(NamedTuple):
    """Predictions for the A anchors of all levels, finest level first, and for the T steps of the padded clip."""

    logits: Tensor
    """(B, A, 1 + K), background first; (B, A, 1) with a single class"""
    proposals: Tensor
    """(B, A, 2) starts and ends in steps that the anchors decode to"""
    adjusted: Tensor
    """(B, A, 2) the same with their boundaries moved"""
    evaluation: Tensor
    """(B, 3, T) logits: an action starts, ends, goes on here"""
    anchors: Tensor
    """(A, 2) float32, in steps"""
    mask: Tensor
    """(B, T) bool, True where a step of the padded clip is real; real steps come first"""


class VSGN(Localizer[VSGNOutputs]):
    """Encoder, decoder, two anchor heads, boundary head and evaluation head."""

    def __init__(self, config: VSGNConfig, *, in_channels: int, classes: Sequence[str]) -> None:
        super().__init__()
        self.config = config
        self.in_channels = in_channels
        self.class_map = ClassMap(classes, agnostic=config.class_agnostic)
        self.classes = self.class_map.classes
        channels, num_levels = config.channels, config.num_levels
        self.encoder = PyramidEncoder(
            in_channels,
            channels=channels,
            num_levels=num_levels,
            first_stride=config.first_stride,
            num_neighbours=config.num_neighbours,
        )
        self.decoder = PyramidDecoder(channels, num_levels=num_levels)
        num_logits = 1 if len(self.classes) == 1 else 1 + len(self.classes)
        self.classifier, self.regressor = (
            AnchorHead(
                channels,
                num_convs=config.num_head_convs,
                num_groups=config.num_groups,
                num_scales=len(config.anchor_scales),
                out_channels=out_channels,
            )
            for out_channels in (num_logits, 2)
        )
        self.boundaries = BoundaryHead(channels, stride=config.first_stride)
        self.evaluation = EvaluationHead(channels)
        self.positives = nn.ModuleDict(
            {
                loss: RunningCount(config.initial_positives, momentum=config.positives_momentum)
                for loss in ("regression", "classification", "adjustment")
            }
        )
        for module in self.modules():
            if isinstance(module, (nn.Conv1d, nn.Linear)):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def class_rows(self) -> dict[str, tuple[int, int]]:
        """Those of the classifier: for each anchor at a position the background, then the classes."""
        layout = (len(self.config.anchor_scales), 0 if len(self.classes) == 1 else 1)
        return {f"classifier.output.{kind}": layout for kind in ("weight", "bias")}

    def forward(self, features: Features) -> VSGNOutputs:
        """Features (B, C, T) of any T -> predictions for all anchors of the padded clip."""
        padding = -features.values.shape[-1] % self.config.strides[-1]
        values, mask = F.pad(features.values, (0, padding)), F.pad(features.mask, (0, padding))
        num_steps = values.shape[-1]
        levels = self.decoder(self.encoder(values, mask)).levels
        config = self.config
        anchors = pyramid_anchors(num_steps, config.strides, config.anchor_scales, device=values.device)
        proposals = decode(anchors, self.regressor(levels))
        return VSGNOutputs(
            logits=self.classifier(levels),
            proposals=proposals,
            adjusted=proposals + self.boundaries(levels[0], proposals, num_steps=num_steps),
            evaluation=self.evaluation(levels[0], num_steps=num_steps),
            anchors=anchors,
            mask=mask,
        )

    def loss(
        self, outputs: VSGNOutputs, actions: Sequence[Sequence[Action]], timelines: Sequence[Timeline]
    ) -> dict[str, Tensor]:
        """ "evaluation", "regression", "classification", "adjustment" and their sum "total".

        In training it also updates `positives`. Clips without any real step count for nothing. Raises ValueError for a
        label that is not among the classes.
        """
        truth = [
            self.class_map.encode(of_clip, timeline, device=outputs.anchors.device)
            for of_clip, timeline in zip(actions, timelines, strict=True)
        ]
        real = outputs.mask.any(dim=1)
        logits, proposals, adjusted, evaluation = (
            # Zeros in clips that count for nothing, so that no NaN of theirs reaches a gradient.
            torch.where(real[:, None, None], x.float(), 0.0)
            for x in (outputs.logits, outputs.proposals, outputs.adjusted, outputs.evaluation)
        )
        anchors = outputs.anchors.expand(len(truth), -1, -1)
        losses = {
            "evaluation": self._evaluation_loss(evaluation, truth, real),
            "regression": self._segment_loss("regression", proposals, anchors, truth, real, self.config.anchor_iou),
            "classification": self._classification_loss(logits, proposals, truth, real),
            "adjustment": self._segment_loss("adjustment", adjusted, proposals, truth, real, self.config.boundary_iou),
        }
        return losses | {"total": torch.stack(list(losses.values())).sum()}

    @torch.no_grad()
    def detect(self, outputs: VSGNOutputs, timelines: Sequence[Timeline]) -> list[Detections]:
        """One Detections per clip, in seconds, not yet suppressed."""
        return [
            Detections(timeline.to_seconds(segments), scores, labels)
            for (segments, scores, labels), timeline in zip(self.candidates(outputs), timelines, strict=True)
        ]

    @torch.no_grad()
    def candidates(self, outputs: VSGNOutputs) -> list[Candidates]:
        """What `detect` converts to seconds: one Candidates per clip, in steps, of anchors whose centre is a real step.

        OpenTAD decodes the padding as well.
        """
        logits, adjusted = outputs.logits.float(), outputs.adjusted.float()
        scores = logits.sigmoid() if len(self.classes) == 1 else logits.softmax(dim=-1)[..., 1:]
        starts, ends, _ = outputs.evaluation.float().sigmoid().unbind(dim=1)
        num_real = outputs.mask.sum(dim=1)
        last = (num_real - 1).clamp(min=0).to(adjusted.dtype)[:, None, None]
        segments = adjusted.clamp(min=0).minimum(last)
        weights = _between(starts, segments[..., 0]) * _between(ends, segments[..., 1])
        scores = scores * weights[..., None]
        real = outputs.anchors.mean(dim=1) < num_real[:, None]
        return [
            best_of_clip(
                of_clip[kept],
                score[kept],
                min_score=self.config.candidate_min_score,
                top_k=self.config.candidate_top_k,
            )
            for of_clip, score, kept in zip(segments, scores, real, strict=True)
        ]

    def _matches(self, segments: Tensor, truth: Truth, real: Tensor, min_iou: float) -> Matches:
        """Of all clips: labels (B, A), 0 in clips that are not real, and segments (B, A, 2)."""
        matches = [match(of_clip, *known, min_iou=min_iou) for of_clip, known in zip(segments, truth, strict=True)]
        labels, found = (torch.stack(column) for column in zip(*matches, strict=True))
        return Matches(torch.where(real[:, None], labels, 0), found)

    def _segment_loss(
        self, name: str, predicted: Tensor, matched: Tensor, truth: Truth, real: Tensor, min_iou: float
    ) -> Tensor:
        """GIoU loss of the predictions whose `matched` segments, (B, A, 2), overlap an action."""
        matches = self._matches(matched, truth, real, min_iou)
        positive = matches.labels > 0
        # Elsewhere both are the same segment, whatever stands there.
        predicted, wanted = (torch.where(positive[..., None], x, 0.0) for x in (predicted, matches.segments))
        loss = torch.where(positive, giou_loss(predicted, wanted), 0.0).sum()
        return loss / self._divisor(name, positive)

    def _classification_loss(self, logits: Tensor, proposals: Tensor, truth: Truth, real: Tensor) -> Tensor:
        labels = self._matches(proposals, truth, real, self.config.anchor_iou).labels
        positive = labels > 0
        divisor = self._divisor("classification", positive)
        if len(self.classes) == 1:
            alpha = self.config.focal_alpha
            return focal_of_chosen(logits[..., 0], positive.float(), real[:, None], alpha=alpha).sum() / divisor
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
        # Positives and negatives, however many, weigh the same.
        sides = (positive, ~positive & real[:, None])
        balanced = [torch.where(side, loss, 0.0).sum() / side.sum().clamp(min=1) for side in sides]
        return torch.stack(balanced).sum()

    def _evaluation_loss(self, logits: Tensor, truth: Truth, real: Tensor) -> Tensor:
        targets = torch.stack([evaluation_targets(segments, logits.shape[2]) for segments, _ in truth])
        mask = real[:, None].expand_as(targets[:, 0])
        return torch.stack([balanced_bce(logits[:, kind], targets[:, kind], mask) for kind in range(3)]).sum()

    def _divisor(self, loss: str, positive: Tensor) -> Tensor:
        count = positive.sum().clamp(min=1)
        running = self.positives[loss]
        assert isinstance(running, RunningCount)
        return running.update(count) if self.training else count


Truth = Sequence[tuple[Tensor, Tensor]]
"""Per clip: segments (N, 2) in steps and classes (N,)."""


def _between(values: Tensor, steps: Tensor) -> Tensor:
    """The mean of the values at the steps before and after: (B, T), (B, A) fractional steps -> (B, A)."""
    before, after = (values.gather(1, where.long()) for where in (steps.floor(), steps.ceil()))
    return (before + after) / 2
