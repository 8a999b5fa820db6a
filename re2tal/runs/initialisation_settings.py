"""Settings of a first configuration, each with its reason.

window >= 1.5 x the length that 95 % of the actions stay below          so that most are seen whole, with context
rate   >= 4 frames for the length that 90 % of the actions exceed       two steps of the grid: it can be found
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from re2tal.backbones import BackboneConfig, trained_wiring
from re2tal.config import DataConfig, RunConfig
from re2tal.data.streaming.stream import ClipConfig
from re2tal.data.streaming.windows import ResizeWhole, Slide
from re2tal.localizers.pyramid.actionformer import ActionFormerConfig
from re2tal.recipes.presets import demo, thumos14_re2swin_tiny
from re2tal.runs.initialisation_facts import DataFacts
from re2tal.training.annealing import AnnealingConfig
from re2tal.training.config import EngineConfig, TrainingConfig
from re2tal.training.optimizer import OptimizerConfig
from re2tal.training.schedule import ScheduleConfig

RATES = (4.0, 6.0, 8.0, 10.0, 12.0, 15.0, 20.0, 25.0, 30.0)
LEAST_FRAMES, MOST_FRAMES = 32, 1024
FRAMES_PER_STEP = 2
# As the published recipes for ActivityNet.
WHOLE_FRAMES = 768
BATCH_SIZES = (4, 2, 1)
LEAST_STEPS = 6
"""An epoch has so many where it can."""
LEAST_EPOCHS, MOST_EPOCHS = 10, 100
ANNEALING_EPOCHS = 5.0
"""From a plain pretrained network to the rewired one (docs/recipes.md)."""

FILE_BACKBONE = "swin3d_tiny"
"""What weights are of where no backbone is named."""


@dataclass(frozen=True, slots=True)
class Start:
    """What the backbone begins with."""

    backbone: str | None = None
    weights: str | None = None


@dataclass(frozen=True, slots=True)
class Proposal:
    """A configuration, still without batch and place of the shards."""

    config: RunConfig
    reasons: Sequence[tuple[str, str, str]]
    """Key, value, why."""
    short_side: int
    """Pixels to store videos at."""
    stored_fps: float | None
    """Rate to store videos at; None stores a number of frames."""


def choose(data: DataFacts, start: Start) -> Proposal:
    """A whole configuration for `data`; ValueError for videos too slow for any window."""
    windowing, why_window, why_rate = _windowing(data)
    config, why_start, short_side = _started(start, data)
    frames = windowing.num_frames
    num_steps = frames // FRAMES_PER_STEP if isinstance(windowing, Slide) else frames // 4
    levels = _levels(num_steps)
    clips = replace(config.data.clips, windowing=windowing, flip=not data.sided)
    # ActionFormer's ranges: each level takes actions about twice as long as the one before, the last one all longer
    # ones.
    ranges = tuple((0 if level == 0 else 2.0 ** (level + 1), 2.0 ** (level + 2)) for level in range(levels))
    assert isinstance(config.localizer, ActionFormerConfig)
    localizer = replace(
        config.localizer, max_num_steps=num_steps, regression_ranges=(*ranges[:-1], (ranges[-1][0], 10_000))
    )
    config = replace(config, num_steps=num_steps, data=replace(config.data, clips=clips), localizer=localizer)
    rate = windowing.frames_per_second if isinstance(windowing, Slide) else None
    reasons = [
        ("classes", str(len(data.classes)), f"labels of the annotations: {_short(data.classes)}"),
        ("data.clips.windowing", _described(windowing), why_window),
        *([("data.clips.windowing.frames_per_second", f"{rate:g}", why_rate)] if rate else []),
        (
            "num_steps",
            f"{num_steps}, in {levels} levels",
            f"a step is {frames // num_steps} frames; the coarsest level finds actions as long as the window",
        ),
        _flip(data),
        *why_start,
    ]
    return Proposal(config, reasons, min(short_side, data.short_side - data.short_side % 2), rate)


def _windowing(data: DataFacts) -> tuple[Slide | ResizeWhole, str, str]:
    long, short = float(np.quantile(data.action_seconds, 0.95)), float(np.quantile(data.action_seconds, 0.1))
    # 0.01: a rate measured over a whole file may come out a hair low, 14.999 for 15.
    slow = [rate for rate in RATES if rate <= data.least_fps + 0.01]
    if not slow:
        raise ValueError(f"a video has {data.least_fps:.2f} frames per second; at least {RATES[0]:g} are needed")
    wanted = max(8.0, 4 / short)
    rate = next((one for one in slow if one >= wanted), slow[-1])
    # No longer than the longest video: a window beyond it would be padding.
    seconds = min(1.5 * long, float(data.video_seconds[-1]))
    # A slower rate, rather than a window that cuts actions.
    fitting = [one for one in slow if one <= rate and one * seconds <= MOST_FRAMES]
    why_rate = f"a tenth of the actions last {short:.1f} s or less; the slowest video has {data.least_fps:.1f} a second"
    about = f"95 % of the {len(data.action_seconds)} training actions last at most {long:.1f} s"
    if not fitting:
        why = f"{about}, too long for a window of {MOST_FRAMES} frames: each video is seen as a whole"
        return ResizeWhole(num_frames=WHOLE_FRAMES), why, ""
    unit = 32 if fitting[-1] * seconds < 256 else 64
    # Whole units, so that the grid can be halved once for each level.
    frames = min(MOST_FRAMES, max(LEAST_FRAMES, unit * math.ceil(fitting[-1] * seconds / unit)))
    why = f"{about}; a window shows at least one and a half times that: {frames / fitting[-1]:.1f} s"
    return Slide(num_frames=frames, frames_per_second=fitting[-1]), why, why_rate


def _levels(num_steps: int) -> int:
    """As many as the grid can be halved, so that the coarsest still has a few steps: 4 of 32, 6 of 256 and more."""
    most = 4 if num_steps < 64 else 5 if num_steps < 256 else 6
    while num_steps % 2 ** (most - 1):
        most -= 1
    return most


def _described(windowing: Slide | ResizeWhole) -> str:
    kind = "windows" if isinstance(windowing, Slide) else "whole videos"
    return f"{kind} of {windowing.num_frames} frames"


def _flip(data: DataFacts) -> tuple[str, str, str]:
    if data.sided:
        return (
            "data.clips.flip",
            "false",
            f"a mirror would swap sides or turns, which labels name: {_short(data.sided)}",
        )
    return "data.clips.flip", "true", "no label names left, right or a turn; switch it off if sides matter all the same"


def _started(start: Start, data: DataFacts) -> tuple[RunConfig, list[tuple[str, str, str]], int]:
    """Backbone, optimizer and schedule; why; and the shorter side to store videos at."""
    if start.weights is None:
        return _from_nothing(start, data)
    base = thumos14_re2swin_tiny()
    name = start.backbone or FILE_BACKBONE
    is_ours = name.startswith(("swin3d", "slowfast"))
    # Weights that were trained rewired decide how; plain ones are rewired as recipes do.
    wiring = trained_wiring(BackboneConfig(name=name, weights=start.weights))
    backbone = BackboneConfig(
        name=name,
        weights=start.weights,
        norm_eval=is_ours,
        chunk_mebibytes=512 if is_ours else None,
        **(wiring or ({"unit": "block"} if name.startswith("slowfast") else {})),
    )
    epochs = _epochs(data, batch_size=1, steps=3000)
    annealing = AnnealingConfig(epochs=0.0 if wiring else min(ANNEALING_EPOCHS, epochs / 2))
    config = replace(
        base,
        backbone=backbone,
        annealing=annealing,
        engine=EngineConfig(batch_size=1, precision="bf16"),
        training=TrainingConfig(
            epochs=epochs,
            # Of few videos 100 epochs are few steps, and 0.999 would still average the initial weights.
            average_decay=0.999 if epochs * data.num_training >= 2500 else 0.98,
            log_every_steps=20,
            evaluate_every_epochs=10,
        ),
    )
    how = "the file was trained rewired" if wiring else f"plain weights become rewired over {annealing.epochs:g} epochs"
    reasons = [
        ("backbone", f"{name} from {start.weights}", how),
        ("data.clips.size", str(config.data.clips.size), "what pretrained backbones are used to"),
        ("optimizer", "1e-4, backbone 1e-5", "the published rates: a pretrained backbone moves slowly"),
        ("training.epochs", f"{epochs}", _why_epochs(data, steps=3000)),
    ]
    return config, reasons, 256


def _from_nothing(start: Start, data: DataFacts) -> tuple[RunConfig, list[tuple[str, str, str]], int]:
    name = start.backbone or "swin3d_nano"
    epochs = _epochs(data, batch_size=largest_batches(data.num_training)[0], steps=540)
    config = replace(
        demo(),
        backbone=BackboneConfig(name=name),
        data=DataConfig(clips=ClipConfig(size=48, fit="stretch", crop_area=(0.7, 1.0), colour_jitter=0.0, workers=1)),
        optimizer=OptimizerConfig(learning_rate=1e-3, backbone_learning_rate=3e-4),
        schedule=ScheduleConfig(warmup_epochs=epochs / 12),
        training=TrainingConfig(epochs=epochs, average_decay=0.98, log_every_steps=10, checkpoint_every_steps=100),
    )
    reasons = [
        (
            "backbone",
            f"{name} from random weights",
            "no --weights were given: it learns coarse things in minutes on a processor. For more, give those of a "
            "network pretrained on Kinetics (docs/recipes.md says where from)",
        ),
        ("data.clips.size", "48", "what a small network learns from on a processor"),
        ("optimizer", "1e-3, backbone 3e-4", "random weights: all of the network has to move"),
        ("training.epochs", f"{epochs}", _why_epochs(data, steps=540)),
    ]
    return config, reasons, 64


def largest_batches(num_training: int) -> list[int]:
    """Batch sizes that leave an epoch LEAST_STEPS steps, the largest first; 1 at the least."""
    return [size for size in BATCH_SIZES if size == 1 or LEAST_STEPS * size <= num_training]


def _why_epochs(data: DataFacts, *, steps: int) -> str:
    return (
        f"times through the {data.num_training} training videos: about {steps} steps, but at least {LEAST_EPOCHS} and "
        f"at most {MOST_EPOCHS} times"
    )


def _epochs(data: DataFacts, *, batch_size: int, steps: int) -> int:
    return int(min(MOST_EPOCHS, max(LEAST_EPOCHS, round(steps * batch_size / max(1, data.num_training)))))


def _short(names: Sequence[str]) -> str:
    return ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
