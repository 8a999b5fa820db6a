"""Runs on stored features: any recipe, its backbone taken out, its clips counted in steps instead of frames.

a recipe on videos        64 frames, 8 a second -> backbone, 2 frames a step -> 32 steps -> localizer
the same on its features  32 steps, 4 a second                                           -> localizer
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from re2tal.backbones import WIRING, BackboneConfig
from re2tal.backbones.stored import NAME
from re2tal.config import AnyRun, RecognitionConfig, RunConfig
from re2tal.data.contract.feature_manifest import (
    Extracted,
    FeatureGrid,
    FeatureSpec,
    Packed,
    SecondsPerStep,
    StepsPerVideo,
)
from re2tal.data.contract.shards import FeatureSet, ShardSet
from re2tal.data.streaming.windows import ResizeWhole, Slide, Windowing
from re2tal.training.annealing import AnnealingConfig


def on_features(config: RunConfig, features: FeatureSet) -> RunConfig:
    """`config` without its backbone, on `features`; a run that is on features already stays as it is.

    A window keeps its length in seconds. Raises ValueError where the recipe's windows do not fit the features' grid.
    """
    if config.backbone.name == NAME:
        return config
    spec = features.manifest.features
    windowing = _in_steps(config, spec.grid)
    return replace(
        config,
        backbone=BackboneConfig(name=NAME, feature_channels=spec.channels, rewired=False),
        annealing=AnnealingConfig(),
        data=replace(config.data, clips=replace(config.data.clips, windowing=windowing)),
    )


def check_kind(config: AnyRun, shards: ShardSet | FeatureSet) -> None:
    """ValueError unless `config` takes the content of `shards`: videos, or features of its number of channels."""
    match shards:
        case ShardSet() if config.backbone.name == NAME:
            raise ValueError(
                f"{shards.root} holds videos, but this run's backbone is {NAME!r}: it takes stored features; extract "
                "them (re2tal features extract) with what its training features were extracted with, and give their "
                "folder"
            )
        case FeatureSet() if isinstance(config, RecognitionConfig) or config.backbone.name != NAME:
            raise ValueError(
                f"{shards.root} holds features, but this run's backbone, {config.backbone.name}, takes videos; "
                "give a folder that `re2tal shards build` wrote"
            )
        case FeatureSet() if shards.manifest.features.channels != config.backbone.feature_channels:
            raise ValueError(
                f"{shards.root} holds features of {shards.manifest.features.channels} channels, this run takes "
                f"{config.backbone.feature_channels} (backbone.feature_channels); give the features it was made for"
            )


def check_pair(training: FeatureSet, validation: FeatureSet) -> None:
    """ValueError unless two subsets hold the same features."""
    one, other = describe(training), describe(validation)
    if (difference := _difference(one, other)) is not None:
        raise ValueError(
            f"{training.root} and {validation.root} hold other features: {difference}; extract or pack both alike"
        )


def check_features(shards: FeatureSet, trained_on: Mapping[str, Any] | None, *, run: Path) -> None:
    """ValueError unless `shards` hold what the model of `run` was trained on, as `describe` told it then.

    `trained_on` is None for a model whose file does not say: then nothing is compared.
    """
    found = describe(shards)
    if trained_on is not None and (difference := _difference(found, trained_on)) is not None:
        raise ValueError(
            f"{shards.root} holds features of {found['of']}, and {run} was trained on those of {trained_on['of']}: "
            f"{difference}; give features that were extracted or packed as those were (re2tal shards list FOLDER says "
            "what a folder holds)"
        )


def describe(features: FeatureSet) -> dict[str, Any]:
    """Everything in which features of two folders must agree, as JSON values; "of" says it in words."""
    spec = features.manifest.features
    match spec.origin:
        case Extracted(backbone=name, weights=weights):
            words = f"{name} (weights: {weights})"
        case Packed():
            words = f"another program ({features.manifest.dataset})"
    described = {
        "of": words,
        "channels": spec.channels,
        "grid": str(spec.grid),
        "weights_sha256": getattr(spec.origin, "weights_sha256", None),
        "clips": getattr(spec.origin, "clips", None),
        "the backbone's wiring": _wiring(spec),
        "window_frames": getattr(spec.origin, "window_frames", None),
    }
    # As it comes back from a model file: tuples are lists there.
    return json.loads(json.dumps(described))


def _difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
    """The first thing in which two descriptions differ, whatever their words."""
    for name, value in one.items():
        if name != "of" and value != other[name]:
            return f"{name} is {value} and {other[name]}"
    return None


def _wiring(spec: FeatureSpec) -> dict[str, Any]:
    """The options on which a backbone's function depends, beside its weights; None for features of other programs."""
    settings = spec.origin.settings if isinstance(spec.origin, Extracted) else {}
    return {name: settings.get(name) for name in ("rewired", *WIRING, "frames_per_step")}


def _in_steps(config: RunConfig, grid: FeatureGrid) -> Windowing:
    match config.data.clips.windowing, grid:
        case Slide(num_frames=num_frames, frames_per_second=float(rate)) as slide, SecondsPerStep(seconds):
            num_steps = max(1, round(num_frames / rate / seconds))
            return replace(slide, num_frames=num_steps, frames_per_second=1 / seconds)
        case ResizeWhole() as whole, StepsPerVideo(num_steps):
            return replace(whole, num_frames=max(num_steps, config.num_steps))
        case ResizeWhole() as whole, _:
            return replace(whole, num_frames=config.num_steps)
        case windowing, _:
            raise ValueError(
                f"the recipe's windows, {windowing}, cannot be counted in steps of these features, whose grid is "
                f"{grid}; take a recipe for features (thumos14_actionformer_features), or one of whole videos"
            )
