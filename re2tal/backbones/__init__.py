"""One file per backbone family; BACKBONES lists them, `build_backbone` builds any of them from a configuration."""

from __future__ import annotations

from collections.abc import Callable

from re2tal.backbones.base import BackboneConfig, VideoBackbone, freeze, freeze_norms
from re2tal.backbones.swin3d import SIZES, build_swin3d
from re2tal.rewire import RewiringConfig, rewire

__all__ = ["BACKBONES", "BackboneConfig", "VideoBackbone", "build_backbone"]

# A builder returns the network with the weights that the configuration names, plain and trainable.
BACKBONES: dict[str, Callable[[BackboneConfig], VideoBackbone]] = {
    **dict.fromkeys(SIZES, build_swin3d),
}


def build_backbone(config: BackboneConfig) -> VideoBackbone:
    """Build with its weights, freeze what is to stay as it is, and rewire, in this order.

    Raises ValueError for an unknown name and for weights that do not fit, FileNotFoundError where there are none.
    """
    try:
        build = BACKBONES[config.name]
    except KeyError:
        raise ValueError(f"unknown backbone {config.name!r}; known: {sorted(BACKBONES)}") from None
    backbone = build(config)
    if config.frozen:
        freeze(backbone)
    if config.norm_eval:
        freeze_norms(backbone)
    if config.rewired:
        rewire(
            backbone,
            config=RewiringConfig(
                unit=config.unit, merge=config.merge, segment=config.segment, recompute=config.recompute
            ),
        )
    return backbone
