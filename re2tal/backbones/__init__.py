"""One file per backbone family; BACKBONES lists them, `build_backbone` builds any of them from a configuration."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

from re2tal.backbones import stored
from re2tal.backbones.adapters.temporal import TemporalAdapter
from re2tal.backbones.base import BackboneConfig, VideoBackbone, freeze, freeze_but, freeze_norms
from re2tal.backbones.hub.tiling import ClipwiseBackbone
from re2tal.backbones.slowfast import layouts as slowfast_layouts
from re2tal.backbones.slowfast import network as slowfast
from re2tal.backbones.swin3d import layouts as swin3d_layouts
from re2tal.backbones.swin3d import network as swin3d
from re2tal.backbones.weights import checked_wiring, is_weights_file, read_wiring
from re2tal.options import names_with
from re2tal.rewire import rewire, same_wiring
from re2tal.strict_json import read_json

__all__ = [
    "BACKBONES",
    "WIRING",
    "WIRING_KEY",
    "BackboneConfig",
    "VideoBackbone",
    "build_backbone",
    "check_wiring",
    "is_of_the_library",
    "plain_start",
    "take_parts_of",
    "trained_wiring",
]

Builder = Callable[[BackboneConfig], VideoBackbone]


def _rows(family: str, *sizes: str, module: str) -> dict[str, Builder]:
    """`family_size` for each size, built by `module`, which is imported then: transformers takes seconds to import."""

    def build(config: BackboneConfig) -> VideoBackbone:
        return import_module(f"re2tal.backbones.hub.{module}").build(config)

    return {f"{family}_{size}": build for size in sizes}


# A builder returns the network with the weights that the configuration names, plain and trainable.
BACKBONES: dict[str, Builder] = {
    **dict.fromkeys(swin3d.SIZES, swin3d.build_swin3d),
    **dict.fromkeys(slowfast.SIZES, slowfast.build_slowfast),
    **_rows("videomae", "nano", "small", "base", "large", "huge", "giant", module="videomae"),
    **_rows("vivit", "nano", "base", module="vivit"),
    **_rows("vjepa2", "nano", "large", "huge", "giant", module="vjepa2"),
    **_rows("internvideo2", "nano", "1b", "6b", module="internvideo2"),
    **_rows("timesformer", "nano", "base", module="timesformer"),
    **_rows("videoprism", "nano", "base", "large", module="videoprism"),
    **_rows("vit", "nano", "base", "large", module="image_towers"),
    **_rows("dinov2", "nano", "small", "base", "large", module="image_towers"),
    **_rows("dinov3", "nano", "small", "base", "large", module="image_towers"),
    **_rows("clip", "nano", "base", "large", module="image_towers"),
    **_rows("siglip", "nano", "base", "large", module="image_towers"),
}


WIRING = tuple(names_with(BackboneConfig(), "wiring"))
"""The options that change the function of a rewired network with the same weights."""


WIRING_KEY = "re2tal_wiring"
"""In the config.json of a folder or hub name of the transformers library: how the network was rewired that wrote it."""


def trained_wiring(config: BackboneConfig) -> dict[str, Any] | None:
    """The wiring of the network that wrote what `config.weights` names; None for a plain one, and for none.

    Raises ValueError for a hub name whose config.json cannot be read, and for a record that is no wiring.
    """
    if config.weights is None:
        return None
    path = Path(config.weights)
    if path.is_file():
        # Other code bases train rewired networks of these families only; those of the transformers library are plain.
        families = ((swin3d.SIZES, swin3d_layouts.KEY_LAYOUTS), (slowfast.SIZES, slowfast_layouts.KEY_LAYOUTS))
        layouts = next((layouts for sizes, layouts in families if config.name in sizes), ())
        return read_wiring(path, layouts=layouts)
    if (described := path / "config.json").is_file():
        content = read_json(described)
    elif is_of_the_library(config.name, config.weights):
        content = import_module("re2tal.backbones.hub.pretrained").read_config(config.weights)
    else:
        return None
    wiring = content.get(WIRING_KEY) if isinstance(content, dict) else None
    return checked_wiring(wiring, what=f"{WIRING_KEY} in the config.json of {config.weights}")


def is_of_the_library(name: str, weights: str) -> bool:
    """True if `weights` can only be a folder or hub name of the transformers library, for the backbone of that name."""
    # The library has no InternVideo2.
    ours = name in swin3d.SIZES or name in slowfast.SIZES or name.startswith("internvideo2")
    return name in BACKBONES and not ours and not is_weights_file(weights)


def check_wiring(config: BackboneConfig, *, first_beta: float | None = None) -> None:
    """Raises ValueError where `weights` was trained with another wiring than that of `config`.

    Nothing else would show it: with another wiring, the same weights compute another function. `first_beta` is beta in
    the first step, where training changes it.
    """
    if first_beta == 0 and config.weights is not None and config.name in slowfast.SIZES and config.unit == "branch":
        raise ValueError(
            f"annealing starts from the network before rewiring, and the branches of {config.name} make another one of "
            "it: they take its ReLUs inside. Set backbone.unit to 'block', or annealing.epochs to 0"
        )
    trained = trained_wiring(config)
    if trained is None:  # plain: what every wiring starts from
        return
    ours = {name: getattr(config, name) for name in WIRING} | {"ends": []}
    if config.rewired and same_wiring(ours | ({} if first_beta is None else {"beta": first_beta}), trained):
        return
    if config.rewired and same_wiring(ours, trained):
        raise ValueError(
            f"{config.weights} was trained rewired with beta {trained['beta']}, and annealing would start at beta "
            f"{first_beta}, where these weights compute something else; set annealing.epochs to 0 (annealing is for "
            f"weights of a plain network), or annealing.start to {trained['beta']}"
        )
    raise ValueError(
        f"{config.weights} was trained rewired with {trained}, and here the backbone is "
        f"{f'rewired with {ours}' if config.rewired else 'plain'}, which computes something else; set "
        f"{', '.join(f'backbone.{name}' for name in ('rewired', *WIRING))} to what it was trained with. To start "
        f"from these numbers all the same: re2tal import {config.weights} --backbone.name {config.name} --as-plain "
        "--out FILE.safetensors"
    )


def plain_start(config: BackboneConfig, *, first_beta: float | None = None) -> str | None:
    """A warning where weights of a plain network start a rewired one, which computes something else with them.

    None where that is not so: no weights, a plain backbone, weights trained rewired, or a coupling that starts at or
    near the plain network. `first_beta` is as in `check_wiring`.
    """
    beta = config.beta if first_beta is None else first_beta
    near = beta == 0 or (config.merge == "extrapolate" and config.segment is not None)
    if config.weights is None or not config.rewired or near or trained_wiring(config) is not None:
        return None
    frozen = " Its trunk is frozen, and cannot adjust to this." if config.adapter != "none" else ""
    return (
        f"{config.weights} holds weights of a plain network, and backbone.rewired makes another one of them, whose "
        f"first features mean little.{frozen} Three ways out: go there step by step (annealing.epochs above 0, "
        "annealing.start 0); stay near (backbone.merge extrapolate, backbone.segment 2); or train the rewired network "
        "on Kinetics first (re2tal train --recipe kinetics400_re2swin_tiny_10) and give its model.safetensors as "
        "backbone.weights"
    )


def build_backbone(config: BackboneConfig) -> VideoBackbone:
    """Builds the network with its weights, freezes what `config` says, and rewires it, in this order.

    Raises ValueError for an unknown name and for weights that do not fit, FileNotFoundError where there are none.
    """
    if config.name == stored.NAME:
        return stored.build(config)
    if config.feature_channels is not None:
        raise ValueError(
            f"backbone.feature_channels is {config.feature_channels}, but {config.name} is a network, which knows its "
            "channels; leave it out"
        )
    try:
        build = BACKBONES[config.name]
    except KeyError:
        raise ValueError(f"unknown backbone {config.name!r}; known: {sorted(BACKBONES)}") from None
    backbone = build(config)
    if config.frames_per_step not in (None, backbone.frames_per_step):
        raise ValueError(
            f"{config.name} gives a step per {backbone.frames_per_step} frames, but backbone.frames_per_step is "
            f"{config.frames_per_step}; leave it out"
        )
    _set_clips(backbone, config)
    _adapt(backbone, config)
    if config.frozen:
        freeze(backbone)
    if config.norm_eval:
        freeze_norms(backbone)
    if config.rewired:
        rewire(backbone, config=config.rewiring())
    return backbone


def _set_clips(backbone: VideoBackbone, config: BackboneConfig) -> None:
    """Sets how clips are encoded; ValueError where there are none, or where they depend on each other."""
    for name in ("clips_at_once", "trained_clips"):
        key = f"backbone.{name} is {(value := getattr(config, name))}"
        if value == getattr(BackboneConfig(), name):
            continue
        if not isinstance(backbone, ClipwiseBackbone):
            raise ValueError(
                f"{key}, but {config.name} takes a video as one clip; leave it out, or choose a family that cuts video "
                "into clips (docs/backbones.md)"
            )
        if backbone.encoder.crosses_clips:
            raise ValueError(
                f"{key}, but the adapters of this backbone convolve over all clips of a window, so all are encoded "
                "together; leave it out, or set backbone.adapter to 'lora' or 'none'"
            )
    if isinstance(backbone, ClipwiseBackbone):
        backbone.clips_at_once = config.clips_at_once


def take_parts_of(backbone: VideoBackbone, names: Iterable[str]) -> None:
    """For a backbone that is built without the file it was trained from: what that file decided on.

    `names` are the entries that its training wrote. Which norm a VideoMAE ends in follows from its first weights.
    """
    encoder: Any = getattr(backbone, "encoder", None)
    if hasattr(encoder, "take_last_norm"):
        encoder.take_last_norm(names)


def _adapt(backbone: VideoBackbone, config: BackboneConfig) -> None:
    """Freezes all of the backbone but its adapters, if it has any; those of "lora" are added here."""
    if config.adapter == "none":
        return
    if config.adapter == "lora":
        from re2tal.backbones.adapters.lora import add_lora

        trained = add_lora(backbone, config)
    else:
        adapters = [module for module in backbone.modules() if isinstance(module, TemporalAdapter)]
        trained = [parameter for adapter in adapters for parameter in adapter.parameters()]
        if not trained:
            raise ValueError(
                f"backbone.adapter is 'temporal', and {config.name} has no place for it; choose a VideoMAE "
                "(videomae_*), or set adapter to 'lora' or 'none'"
            )
    freeze_but(backbone, trained)
