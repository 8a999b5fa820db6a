"""A localizer on a feature pyramid, put together from parts that can be exchanged.

features (B, C, T) -> encoder -> L levels of T / 2**l steps -> a norm per level
-> heads that all levels share: at every point K class logits and the distances to an action's start and end
loss: `assign` says what each point must predict, `point_loss` how wrong it is      detect: `choose` picks the best
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from re2tal.localizers.base import Localizer
from re2tal.localizers.candidates import Candidates
from re2tal.localizers.class_map import ClassMap
from re2tal.localizers.losses import RunningCount
from re2tal.localizers.masked import MaskedConv
from re2tal.localizers.pyramid.assignment import Assigner, Targets
from re2tal.localizers.pyramid.config import PyramidConfig
from re2tal.localizers.pyramid.loss import PointLoss
from re2tal.localizers.pyramid.points import PyramidOutputs, decode, pyramid_points
from re2tal.localizers.pyramid.step_supervision import step_loss, step_targets
from re2tal.structures import Action, Detections, Features, Pyramid, Timeline


class PyramidLocalizer(Localizer[PyramidOutputs]):
    """Any encoder, norms, heads, assigner, loss and choice of candidates.

    Args:
        encoder: features (B, in_channels, T) and mask (B, T) -> Pyramid
        level_norms: one module per level, (B, C, T_l) -> (B, C, T_l)
        classifier: Pyramid -> logits (B, P, K) at the points of all levels
        regressor: Pyramid -> distances in strides, (B, P, 2) or one pair per class (B, P, K, 2)
        choose: (P, 2) or (P, K, 2) segments, (P, K) scores and (P,) strides of one clip -> Candidates
    """

    def __init__(
        self,
        config: PyramidConfig,
        *,
        in_channels: int,
        class_map: ClassMap,
        encoder: nn.Module,
        level_norms: Sequence[nn.Module],
        classifier: nn.Module,
        regressor: nn.Module,
        assign: Assigner,
        point_loss: PointLoss,
        choose: Callable[[Tensor, Tensor, Tensor], Candidates],
    ) -> None:
        super().__init__()
        self.config = config
        self.in_channels = in_channels
        self.class_map = class_map
        self.classes = class_map.classes
        self.encoder = encoder
        self.level_norms = nn.ModuleList(level_norms)
        self.classifier = classifier
        self.regressor = regressor
        self.assign = assign
        self.point_loss = point_loss
        self.choose = choose
        self.positives = RunningCount(config.initial_positives, momentum=config.positives_momentum)
        self.step_classifier = nn.Conv1d(in_channels, len(self.classes), 1) if config.step_supervision else None

    def class_rows(self) -> dict[str, tuple[int, int]]:
        """Those of the classifiers, and of a regressor that tells classes apart, whose `class_layers` names them."""
        layers = ["classifier.output", *(f"regressor.{layer}" for layer in getattr(self.regressor, "class_layers", ()))]
        layers += ["step_classifier"] if self.step_classifier is not None else []
        return {f"{layer}.{kind}": (1, 0) for layer in layers for kind in ("weight", "bias")}

    def forward(self, features: Features) -> PyramidOutputs:
        """Features (B, C, T) of any T -> predictions at all points of the padded clip."""
        num_steps = features.values.shape[-1]
        padding = self.config.padded_steps(num_steps) - num_steps
        # The mask is padded with False. Here, not where batches are put together: only the localizer knows its
        # multiple.
        pyramid = self.encoder(F.pad(features.values, (0, padding)), F.pad(features.mask, (0, padding)))
        levels = tuple(norm(level) for norm, level in zip(self.level_norms, pyramid.levels, strict=True))
        pyramid = Pyramid(levels, pyramid.masks)
        points = pyramid_points(num_steps + padding, self.config.regression_ranges, device=features.values.device)
        return PyramidOutputs(
            self.classifier(pyramid),
            self.regressor(pyramid),
            points,
            torch.cat(pyramid.masks, dim=1),
            # A tensor in any case: DDP and DeepSpeed go through the outputs, and take nothing else.
            features.values.new_empty(0) if self.step_classifier is None else self.step_classifier(features.values),
        )

    def loss(
        self, outputs: PyramidOutputs, actions: Sequence[Sequence[Action]], timelines: Sequence[Timeline]
    ) -> dict[str, Tensor]:
        """ "classification", "regression", with step supervision "steps", each weighted, and their sum "total".

        In training it also updates `positives`.

        Raises ValueError for a label that is not among the classes.
        """
        clips = [
            self.class_map.encode(of_clip, timeline, device=outputs.points.device)
            for of_clip, timeline in zip(actions, timelines, strict=True)
        ]
        targets = [
            self.assign(outputs.points, *clip, logits=logits, offsets=offsets, mask=mask)
            for clip, logits, offsets, mask in zip(clips, outputs.logits, outputs.offsets, outputs.mask, strict=True)
        ]
        batch = Targets(*(torch.stack(column) for column in zip(*targets, strict=True)))
        losses = self.point_loss(outputs, batch, positives=self.positives, training=self.training)
        if self.step_classifier is not None:
            losses["steps"] = self.config.step_supervision * self._step_loss(outputs, clips)
        return losses | {"total": torch.stack(list(losses.values())).sum()}

    @torch.no_grad()
    def detect(self, outputs: PyramidOutputs, timelines: Sequence[Timeline]) -> list[Detections]:
        """One Detections per clip, in seconds, not yet suppressed."""
        return [
            Detections(timeline.to_seconds(segments), scores, labels)
            for (segments, scores, labels), timeline in zip(self.candidates(outputs), timelines, strict=True)
        ]

    @torch.no_grad()
    def candidates(self, outputs: PyramidOutputs) -> list[Candidates]:
        """What `detect` converts to seconds: one Candidates per clip, in steps, not clipped to the clip."""
        # In float32: bfloat16 has so few digits that many scores would be equal, and their order chance.
        segments, scores = decode(outputs.points, outputs.offsets), outputs.logits.float().sigmoid()
        strides = outputs.points[:, 3]
        return [
            self.choose(of_clip[mask], score[mask], strides[mask])
            for of_clip, score, mask in zip(segments, scores, outputs.mask, strict=True)
        ]

    def _step_loss(self, outputs: PyramidOutputs, clips: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        num_classes, num_steps = outputs.step_logits.shape[1:]
        targets = [step_targets(*clip, num_steps=num_steps, num_classes=num_classes) for clip in clips]
        # The finest level comes first, one point a step.
        return step_loss(outputs.step_logits, torch.stack(targets), outputs.mask[:, :num_steps])


def embedding_convs(config: PyramidConfig, in_channels: int, conv: Callable[..., MaskedConv]) -> list[MaskedConv]:
    """The encoder's first convolutions."""
    widths = [in_channels] + [config.channels] * config.num_embedding_convs
    return [conv(*pair, kernel_size=config.kernel_size) for pair in pairwise(widths)]


def head_convs(config: PyramidConfig, conv: Callable[..., MaskedConv], *, kernel_size: int = 3) -> list[MaskedConv]:
    """A head's hidden convolutions."""
    widths = [config.channels] + [config.head_width] * config.num_head_convs
    return [conv(*pair, kernel_size=kernel_size) for pair in pairwise(widths)]


def logit(probability: float) -> float:
    """What the sigmoid makes `probability` of."""
    return math.log(probability / (1 - probability))
