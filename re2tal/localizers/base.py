"""The contract that every localizer publishes.

Features (B, C, T)  --forward-->  Outputs  --loss-->   named losses, their sum under "total"
                                           --detect--> one Detections per clip, before suppression, in seconds
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Generic, TypeVar

from torch import Tensor, nn

from re2tal.structures import Action, Detections, Features, Timeline

Outputs = TypeVar("Outputs", bound=tuple)


class Localizer(nn.Module, ABC, Generic[Outputs]):
    """A network that finds actions in features.

    `forward` returns the same named tuple of tensors in training and in evaluation. `loss` and `detect` use no
    parameters, so that every parameter is used inside the `forward` that DeepSpeed or DDP wraps.
    """

    classes: tuple[str, ...]
    in_channels: int

    @abstractmethod
    def class_rows(self) -> dict[str, tuple[int, int]]:
        """Names of the tensors whose rows belong to classes -> (groups, rows before the first class of a group).

        With K classes such a tensor has groups x (before + K) rows; the order is that of `classes`.
        """

    @abstractmethod
    def forward(self, features: Features) -> Outputs:
        """Features (B, C, T) -> this localizer's named tuple of tensors."""

    @abstractmethod
    def loss(
        self, outputs: Outputs, actions: Sequence[Sequence[Action]], timelines: Sequence[Timeline]
    ) -> dict[str, Tensor]:
        """Named scalar losses; "total" is what to minimise. `timelines[b]` counts feature steps of clip b."""

    @abstractmethod
    def detect(self, outputs: Outputs, timelines: Sequence[Timeline]) -> list[Detections]:
        """One Detections per clip, in seconds, not yet suppressed. `timelines[b]` counts feature steps of clip b."""
