"""The recognizer: a backbone, the mean over time, then a linear classifier. It says what a trimmed clip shows.

    frames (B, 3, T, H, W) -> backbone (B, C, T') -> mean over valid steps (B, C) -> dropout -> classifier (B, K)

Rewiring changes what a network computes; trained on recognition for a while, it computes something useful again. What
this leaves under `backbone.` is what a detector starts from.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from re2tal.backbones.base import VideoBackbone
from re2tal.backbones.slowfast.network import SlowFast
from re2tal.backbones.weights import read_checkpoint
from re2tal.options import RATE, check_ranges, option
from re2tal.structures import Action, Timeline, to_device

INITIAL_STD = 0.01
"""Of the classifier's weights, as mmaction2 starts it."""

# Ours and transformers'; mmaction2; torchvision, the original Video Swin and VideoMAE; SlowFast; pytorchvideo.
_HEAD = re.compile(r"(?:module\.|model\.)*(classifier|cls_head\.fc_cls|head|head\.projection|blocks\.6\.proj)\.weight")


class Recognition(NamedTuple):
    """Output of a recognizer for B clips."""

    logits: Tensor
    """(B, K) float"""
    valid: Tensor
    """(B,) bool: whether any frame of the clip is"""


@dataclass(frozen=True)
class RecognizerConfig:
    """From features to a class. Defaults: Video Swin on Kinetics."""

    dropout: float = option(0.5, within=RATE)
    """Share of the mean features that is dropped in training."""
    label_smoothing: float = option(0.0, within=RATE)
    """Share of the target that is spread evenly over all classes."""
    pretrained_classifier: bool = True
    """Start from the classifier in the file that backbone.weights names, where it has one for these classes; where it
    does not name its classes, for as many, in this order."""

    def __post_init__(self) -> None:
        check_ranges(self, "recognizer")


class Recognizer(nn.Module):
    """Backbone and classifier as one module, called as a `TemporalActionDetector` is."""

    def __init__(self, backbone: VideoBackbone, config: RecognizerConfig, *, classes: Sequence[str]) -> None:
        super().__init__()
        if len(classes) < 2 or len(set(classes)) != len(classes):
            raise ValueError(f"classes must be distinct and at least two, got {list(classes)}")
        self.backbone = backbone
        self.classes = tuple(classes)
        self.label_smoothing = config.label_smoothing
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(backbone.out_channels, len(classes))
        nn.init.normal_(self.classifier.weight, std=INITIAL_STD)
        nn.init.zeros_(self.classifier.bias)
        self._index = {label: index for index, label in enumerate(classes)}

    def class_rows(self) -> dict[str, tuple[int, int]]:
        """As a localizer's."""
        return {f"classifier.{kind}": (1, 0) for kind in ("weight", "bias")}

    def forward(self, frames: Tensor, frame_mask: Tensor) -> Recognition:
        """(B, 3, T, H, W) normalised float frames, (B, T) bool."""
        values, mask = self.backbone(frames, frame_mask)
        mean = (values * mask[:, None]).sum(dim=2) / mask.sum(dim=1, keepdim=True).clamp(min=1)
        return Recognition(self.classifier(self.dropout(mean)), mask.any(dim=1))

    def loss(
        self,
        outputs: Recognition,
        actions: Sequence[Sequence[Action]],
        timelines: Sequence[Timeline],
        *,
        num_frames: int,
    ) -> dict[str, Tensor]:
        """Mean cross-entropy of the valid clips under "total"; each has one action, which says its class."""
        targets = to_device(torch.tensor(self._targets(actions, outputs.valid)), outputs.logits.device)
        logits = torch.where(outputs.valid[:, None], outputs.logits, 0.0)
        each = F.cross_entropy(logits, targets, reduction="none", label_smoothing=self.label_smoothing)
        return {"total": torch.where(outputs.valid, each, 0.0).sum() / outputs.valid.sum().clamp(min=1)}

    def _targets(self, actions: Sequence[Sequence[Action]], valid: Tensor) -> list[int]:
        known = [len(shown) == 1 and shown[0].label in self._index for shown in actions]
        if not all(known):  # only then, as it waits for the device: clips that are not valid may show anything
            known = valid.logical_not().tolist()
            return [0 if ignored else self._target(shown) for shown, ignored in zip(actions, known, strict=True)]
        return [self._target(shown) for shown in actions]

    def _target(self, shown: Sequence[Action]) -> int:
        if len(shown) != 1 or shown[0].label not in self._index:
            raise ValueError(
                f"a clip shows {[action.label for action in shown]}; recognition trains on clips that show one of its "
                f"{len(self.classes)} classes: build shards of trimmed clips"
            )
        return self._index[shown[0].label]


@torch.no_grad()
def load_classifier(recognizer: Recognizer, path: Path) -> str:
    """Gives `recognizer` the classifier in a weights file, where it has one that fits; tells what was done.

    A file that training here wrote names its classes, and each row goes to its class; any other's are taken as they
    stand where their number agrees.
    """
    checkpoint = read_checkpoint(path)
    heads = [name for name in checkpoint.tensors if _HEAD.fullmatch(name)]
    if len(heads) != 1 or heads[0].removesuffix("weight") + "bias" not in checkpoint.tensors:
        return f"the classifier starts anew: {path} has none"
    name = heads[0].removesuffix(".weight")
    weight, bias = checkpoint.tensors[f"{name}.weight"], checkpoint.tensors[f"{name}.bias"]
    ours = recognizer.classifier
    if weight.ndim != 2 or weight.shape[1] != ours.in_features:
        return f"the classifier starts anew: {name} in {path} is {tuple(weight.shape)}, not (K, {ours.in_features})"
    if "classes" in checkpoint.metadata:
        theirs = json.loads(checkpoint.metadata["classes"])
        if unknown := [label for label in recognizer.classes if label not in theirs]:
            return f"the classifier starts anew: the one in {path} does not know {', '.join(unknown[:3])}"
        rows = torch.tensor([theirs.index(label) for label in recognizer.classes])
        weight, bias = weight[rows], bias[rows]
    elif len(weight) != ours.out_features:
        return f"the classifier starts anew: {name} in {path} has {len(weight)} classes, not {ours.out_features}"
    if name.endswith("cls_head.fc_cls") and isinstance(recognizer.backbone, SlowFast):
        # mmaction2 puts the fast pathway's channels first, we the slow one's, as pytorchvideo does.
        weight = weight.roll(-recognizer.backbone.fast_out_channels, dims=1)
    ours.weight.copy_(weight)
    ours.bias.copy_(bias)
    return f"the classifier is {name} of {path}"
