"""From annotated actions in seconds to segments in steps and class indices."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from re2tal.structures import Action, Timeline, to_device

AGNOSTIC_CLASS = "action"


class ClassMap:
    """Which label is which class; `agnostic` makes all of them one, called "action"."""

    def __init__(self, labels: Sequence[str], *, agnostic: bool) -> None:
        if not labels or len(set(labels)) != len(labels):
            raise ValueError(f"classes must be distinct and at least one, got {list(labels)}")
        self.classes = (AGNOSTIC_CLASS,) if agnostic else tuple(labels)
        # All labels stay known where they are one class: an unknown one is as wrong there.
        self._index = {label: 0 if agnostic else index for index, label in enumerate(labels)}

    def encode(self, actions: Sequence[Action], timeline: Timeline, *, device: torch.device) -> tuple[Tensor, Tensor]:
        """N actions of one clip -> segments (N, 2) float32 in steps of `timeline`, classes (N,) int64.

        Raises ValueError for a label that was not among those given.
        """
        steps = [[timeline.to_steps(a.start_seconds), timeline.to_steps(a.end_seconds)] for a in actions]
        classes = [self._class_of(action.label) for action in actions]
        return (
            # The tensor of no actions would have one axis.
            to_device(torch.tensor(steps, dtype=torch.float32).reshape(-1, 2), device),
            to_device(torch.tensor(classes, dtype=torch.int64), device),
        )

    def _class_of(self, label: str) -> int:
        try:
            return self._index[label]
        except KeyError:
            raise ValueError(
                f"an action is labelled {label!r}, which is not among the {len(self._index)} classes of this "
                f"localizer: {list(self._index)}; build it with the classes of the annotations"
            ) from None
