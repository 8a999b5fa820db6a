"""The only types that cross package borders, and the one class that turns grid steps into seconds.

    seconds = start_seconds + steps * seconds_per_step        (Timeline; clamped to the video)

Shapes: B batch, T time, C channels, H W pixels, L levels, N detections, K classes. Masks are True where data is valid.
`Features` and `Pyramid` are named tuples because they leave `nn.Module.forward`, and DeepSpeed's ZeRO-3 hooks look for
tensors in tuples only. torch is imported where tensors are touched: processes that build shards start without it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, NamedTuple, Self, TypeVar

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Steps = TypeVar("Steps", float, "Tensor")

AMBIGUOUS = "Ambiguous"
"""THUMOS-14's label for a segment that may or may not show an action: neither trained on nor scored."""

SUBSETS = {
    **dict.fromkeys(("train", "training"), "training"),
    **dict.fromkeys(("val", "valid", "validate", "validation"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
"""What subsets are called in the field -> here."""


def find_subset(wanted: str, names: Iterable[str]) -> str | None:
    """The one of `names` that is `wanted`, in any case, or else means the same ("val", "validation")."""
    by_name = {name.lower(): name for name in names}
    name = wanted.lower()
    if name in by_name:
        return by_name[name]
    alike = [by_name[one] for one in by_name if SUBSETS.get(one, one) == SUBSETS.get(name, name)]
    return alike[0] if len(alike) == 1 else None


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on `device`; the host does not wait until the device has come to the copy."""
    import torch

    if device.type == "cuda" and torch.cuda.is_available():
        tensor = tensor.pin_memory()  # the allocator holds the memory until the copy is done
    return tensor.to(device, non_blocking=True)


@dataclass(frozen=True, slots=True)
class Action:
    """One annotated action: what happens from `start_seconds` to `end_seconds`."""

    start_seconds: float
    end_seconds: float
    label: str


@dataclass(frozen=True, slots=True)
class VideoRecord:
    """One annotated video."""

    video_id: str
    subset: str
    duration_seconds: float
    actions: tuple[Action, ...]


@dataclass(frozen=True, slots=True)
class Timeline:
    """A grid of time steps in a video: step 0 is at `start_seconds`.

    Seconds are clamped to [0, duration_seconds]; steps may be fractional.
    """

    start_seconds: float
    seconds_per_step: float
    duration_seconds: float

    def __post_init__(self) -> None:
        for name in ("start_seconds", "seconds_per_step", "duration_seconds"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"Timeline.{name} is {getattr(self, name)}; give a finite number of seconds")
        if self.seconds_per_step <= 0 or self.duration_seconds <= 0:
            raise ValueError(f"Timeline needs positive seconds_per_step and duration_seconds, got {self}")

    def to_seconds(self, steps: Steps) -> Steps:
        """Grid steps (float or any tensor) -> seconds, clamped to the video."""
        from torch import Tensor

        seconds = self.start_seconds + steps * self.seconds_per_step
        if isinstance(seconds, Tensor):
            return seconds.clamp(0.0, self.duration_seconds)
        return min(max(seconds, 0.0), self.duration_seconds)

    def to_steps(self, seconds: Steps) -> Steps:
        """Seconds (float or any tensor) -> fractional grid steps; seconds are clamped to the video first."""
        from torch import Tensor

        if isinstance(seconds, Tensor):
            return (seconds.clamp(0.0, self.duration_seconds) - self.start_seconds) / self.seconds_per_step
        return (min(max(seconds, 0.0), self.duration_seconds) - self.start_seconds) / self.seconds_per_step

    def coarsen(self, factor: float) -> Timeline:
        """The same stretch on a grid whose steps are `factor` times as long."""
        return replace(self, seconds_per_step=self.seconds_per_step * factor)


@dataclass(frozen=True, slots=True)
class _Batch:
    """What both kinds of batch do with their tensors."""

    def to(self, device: torch.device | str) -> Self:
        """The same batch with its tensors on `device`; copies overlap with compute where the memory is pinned."""
        return self._with_each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Self:
        """Called by torch's DataLoader when `pin_memory=True`."""
        return self._with_each(lambda tensor: tensor.pin_memory())

    def _with_each(self, change: Callable[[Tensor], Tensor]) -> Self:
        from torch import Tensor

        values = {one.name: getattr(self, one.name) for one in fields(self)}
        return replace(self, **{name: change(value) for name, value in values.items() if isinstance(value, Tensor)})


@dataclass(frozen=True, slots=True)
class ClipBatch(_Batch):
    """B clips, as they leave the data path: undecorated uint8, to be augmented and normalised on the device.

    `timelines[b]` counts frames of clip b: frame t is shown at `timelines[b].to_seconds(t)`. `actions[b]` lists the
    actions inside clip b, in seconds of the whole video. (video_ids[b], window_ids[b]) names a clip uniquely within an
    epoch. `valid[b]` is False for a clip that stands in for one that could not be decoded, or that pads the last batch
    of an evaluation: it keeps the number of steps equal on all ranks and must be ignored.
    """

    frames: Tensor
    """(B, 3, T, H, W) uint8, RGB"""
    frame_mask: Tensor
    """(B, T) bool"""
    actions: tuple[tuple[Action, ...], ...]
    timelines: tuple[Timeline, ...]
    video_ids: tuple[str, ...]
    window_ids: tuple[int, ...]
    valid: Tensor
    """(B,) bool"""

    @property
    def mask(self) -> Tensor:
        """(B, T) bool, as every kind of batch has it."""
        return self.frame_mask


@dataclass(frozen=True, slots=True)
class FeatureBatch(_Batch):
    """B clips of features that a backbone computed before, in the place of their frames.

    `timelines[b]` counts steps of clip b; everything else is as in `ClipBatch`.
    """

    features: Tensor
    """(B, C, T) float32; zeros where the clip is padded"""
    step_mask: Tensor
    """(B, T) bool"""
    actions: tuple[tuple[Action, ...], ...]
    timelines: tuple[Timeline, ...]
    video_ids: tuple[str, ...]
    window_ids: tuple[int, ...]
    valid: Tensor
    """(B,) bool"""

    @property
    def mask(self) -> Tensor:
        """(B, T) bool, as every kind of batch has it."""
        return self.step_mask


Batch = ClipBatch | FeatureBatch
"""A batch of clips, as frames or as stored features."""


class Features(NamedTuple):
    """Output of a backbone, input of a localizer."""

    values: Tensor
    """(B, C, T') float"""
    mask: Tensor
    """(B, T') bool"""


class Pyramid(NamedTuple):
    """Features at L temporal resolutions, finest first."""

    levels: tuple[Tensor, ...]
    """L tensors (B, C, T_l) float"""
    masks: tuple[Tensor, ...]
    """L tensors (B, T_l) bool"""


@dataclass(frozen=True, slots=True)
class Detections:
    """N detections of one clip or one video, in seconds of the whole video."""

    segments: Tensor
    """(N, 2) float, start and end seconds"""
    scores: Tensor
    """(N,) float in [0, 1]"""
    labels: Tensor
    """(N,) int64, index into the localizer's classes"""
    num_cut: int | None = field(default=None, kw_only=True)
    """how many more a limit on their number left out, at most; None where that is not known"""

    def __len__(self) -> int:
        return self.scores.shape[0]
