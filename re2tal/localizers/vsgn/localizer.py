"""VSGN (Zhao et al., ICCV 2021), as OpenTAD builds it: anchors on a pyramid, refined at their boundaries.

    features (B, C, T) -> encoder -> decoder -> every anchor: class and segment -> boundaries moved
                                             -> every step: does an action start, end, go on here?

A detection's score is its class's, times how much a start its start is, times how much an end its end is. With
`stitch_below` a short clip stands beside a magnified copy of itself (stitching.py), as in the paper, not in OpenTAD.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from re2tal.localizers.base import Localizer
from re2tal.localizers.candidates import Candidates, best_of_clip
from re2tal.localizers.class_map import ClassMap
from re2tal.localizers.losses import RunningCount, focal_of_chosen
from re2tal.localizers.vsgn.anchors import (
    AnchorTargets,
    balanced_bce,
    decode,
    evaluation_targets,
    giou_loss,
    match,
    pyramid_anchors,
)
from re2tal.localizers.vsgn.config import VSGNConfig
from re2tal.localizers.vsgn.network import AnchorHead, BoundaryHead, EvaluationHead, PyramidDecoder, PyramidEncoder
from re2tal.localizers.vsgn.stitching import Layout, stitch
from re2tal.structures import Action, Detections, Features, Timeline


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
    """(B, T) bool, True where a step of the padded clip is real; real steps come first, then the copy's, if any"""
    layout: Tensor
    """(B, 2) float32, where copies of clips lie: a Layout, packed"""


class VSGN(Localizer[VSGNOutputs]):
    """Encoder, decoder, two anchor heads, boundary head and evaluation head."""

    def __init__(self, config: VSGNConfig, *, in_channels: int, classes: Sequence[str]) -> None:
        super().__init__()
        self.config = config
        self.in_channels = in_channels
        self.class_map = ClassMap(classes, agnostic=config.class_agnostic)
        self.classes = self.class_map.classes
        channels, num_levels, original = config.channels, config.num_levels, config.variant == "original"
        self.encoder = PyramidEncoder(
            in_channels,
            channels=channels,
            num_levels=num_levels,
            first_stride=config.first_stride,
            num_neighbours=config.num_neighbours,
            pool_size=2 if original else 3,
        )
        self.decoder = PyramidDecoder(channels, num_levels=num_levels)
        # A single class needs no background: sigmoid and focal loss, as OpenTAD has it on ActivityNet.
        num_logits = 1 if len(self.classes) == 1 else 1 + len(self.classes)
        self.classifier, self.regressor = (
            AnchorHead(
                channels,
                num_convs=config.num_head_convs,
                num_groups=config.num_groups,
                num_scales=len(config.anchor_scales),
                out_channels=out_channels,
                bias=original,
            )
            for out_channels in (num_logits, 2)
        )
        self.boundaries = BoundaryHead(channels, stride=config.first_stride)
        self.evaluation = EvaluationHead(channels, upsamples_scores=original)
        self.positives = nn.ModuleDict(
            {
                loss: RunningCount(config.initial_positives, momentum=config.positives_momentum)
                for loss in ("regression", "classification", "adjustment")
            }
        )
        # As the public implementations begin.
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
        # A whole number of steps at each level: the decoder's upsampling doubles exactly.
        padding = -features.values.shape[-1] % self.config.strides[-1]
        values, mask = F.pad(features.values, (0, padding)), F.pad(features.mask, (0, padding))
        num_steps, config = values.shape[-1], self.config
        layout, copied = Layout.of(mask, below=config.stitch_below, gap=config.stitch_gap), None
        if config.stitch_below is not None:
            values, mask = stitch(Features(values, mask), layout)
            copied = layout.in_copy(torch.arange(num_steps, device=values.device))
        levels = self.decoder(self.encoder(values, mask, copied)).levels
        anchors = pyramid_anchors(num_steps, config.strides, config.anchor_scales, device=values.device)
        proposals = decode(anchors, self.regressor(levels))
        return VSGNOutputs(
            logits=self.classifier(levels),
            proposals=proposals,
            adjusted=proposals + self.boundaries(levels[0], proposals, num_steps=num_steps),
            evaluation=self.evaluation(levels[0], num_steps=num_steps),
            anchors=anchors,
            mask=mask,
            layout=layout.packed(),
        )

    def loss(
        self, outputs: VSGNOutputs, actions: Sequence[Sequence[Action]], timelines: Sequence[Timeline]
    ) -> dict[str, Tensor]:
        """ "evaluation", "regression", "classification", "adjustment" and their sum "total".

        In training it also updates `positives`. Clips without any real step count for nothing. Raises ValueError for a
        label that is not among the classes.
        """
        truth = self._truth(outputs, actions, timelines)
        real = outputs.mask.any(dim=1)
        logits, proposals, adjusted, evaluation = (
            # Zeros in clips that count for nothing, so that no NaN of theirs reaches a gradient.
            torch.where(real[:, None, None], x.float(), 0.0)
            for x in (outputs.logits, outputs.proposals, outputs.adjusted, outputs.evaluation)
        )
        anchors = outputs.anchors.expand(len(truth), -1, -1)
        losses = {
            "evaluation": self.config.evaluation_weight * self._evaluation_loss(evaluation, truth, real),
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
        logits, layout = outputs.logits.float(), Layout.unpacked(outputs.layout, outputs.mask)
        scores = logits.sigmoid() if len(self.classes) == 1 else logits.softmax(dim=-1)[..., 1:]
        starts, ends, _ = outputs.evaluation.float().sigmoid().unbind(dim=1)
        centres, num_steps = outputs.anchors.mean(dim=1), outputs.mask.shape[1]
        # By its centre an anchor belongs to the clip or to the copy.
        copied = layout.in_copy(centres)
        # `_between` needs a step on both sides of a boundary, and no segment may reach from a clip into its copy.
        segments = layout.confined(outputs.adjusted.float(), copied, num_steps=num_steps)
        weights = _between(starts, segments[..., 0]) * _between(ends, segments[..., 1])
        scores = scores * weights[..., None]
        segments = torch.where(copied[..., None], layout.to_clip(segments), segments)
        real = (centres < layout.num_real[:, None]) | copied
        return [
            best_of_clip(
                of_clip[kept],
                score[kept],
                min_score=self.config.candidate_min_score,
                top_k=self.config.candidate_top_k,
            )
            for of_clip, score, kept in zip(segments, scores, real, strict=True)
        ]

    def _truth(self, outputs: VSGNOutputs, actions: Sequence[Sequence[Action]], timelines: Sequence[Timeline]) -> Truth:
        """The actions on the clips' grids; of stitched clips, those in the copy too."""
        layout, stitched = Layout.unpacked(outputs.layout, outputs.mask), self.config.stitch_below is not None
        truth = []
        for clip, (of_clip, timeline) in enumerate(zip(actions, timelines, strict=True)):
            segments, labels = self.class_map.encode(of_clip, timeline, device=outputs.anchors.device)
            if stitched:
                # Where a clip has no copy its actions stand twice, which matches no other anchors.
                segments, labels = torch.cat([segments, layout.to_copy(segments, clip)]), labels.repeat(2)
            truth.append((segments, labels))
        return truth

    def _matches(self, segments: Tensor, truth: Truth, real: Tensor, min_iou: float) -> AnchorTargets:
        """Of all clips: labels (B, A), 0 in clips that are not real, and segments (B, A, 2)."""
        matches = [match(of_clip, *known, min_iou=min_iou) for of_clip, known in zip(segments, truth, strict=True)]
        labels, found = (torch.stack(column) for column in zip(*matches, strict=True))
        return AnchorTargets(torch.where(real[:, None], labels, 0), found)

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
        bce = partial(balanced_bce, mask=mask, epsilon=1e-5 if self.config.variant == "original" else 0.0)
        return torch.stack([bce(logits[:, kind], targets[:, kind]) for kind in range(3)]).sum()

    def _divisor(self, loss: str, positive: Tensor) -> Tensor:
        count = positive.sum().clamp(min=1)
        running = self.positives[loss]
        assert isinstance(running, RunningCount)
        # The count of each loss is its own: each matches other segments at another threshold.
        return running.update(count) if self.training and self.config.variant == "opentad" else count


Truth = Sequence[tuple[Tensor, Tensor]]
"""Per clip: segments (N, 2) in steps and classes (N,)."""


def _between(values: Tensor, steps: Tensor) -> Tensor:
    """The mean of the values at the steps before and after: (B, T), (B, A) fractional steps -> (B, A)."""
    before, after = (values.gather(1, where.long()) for where in (steps.floor(), steps.ceil()))
    return (before + after) / 2
