"""`re2tal rewire`: what of a backbone becomes reversible, what does not and why, and how much less it keeps."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Literal

import tyro

from re2tal.backbones import BackboneConfig, build_backbone
from re2tal.backbones.base import VideoBackbone
from re2tal.backbones.footprint import kept_bytes
from re2tal.backbones.tiling import ClipwiseBackbone
from re2tal.rewire import RewiringConfig, unrewire
from re2tal.rewire import rewire as rewire_in_place


def rewire(
    model: Annotated[str, tyro.conf.Positional],
    *,
    weights: str | None = None,
    unit: Literal["branch", "block"] = "branch",
    merge: Literal["mean", "extrapolate"] = "mean",
    segment: int | None = None,
    beta: float = 1.0,
    frames: int | None = None,
    size: tuple[int, int] | None = None,
) -> None:
    """Rewire a backbone, and print what was rewired, what was left alone and why, and the memory it needs.

    Args:
        model: name of a backbone, such as videomae_base
        weights: a hub name, folder or file, checked and loaded first
        unit: couple branches of blocks, or whole blocks
        merge: how the two end states of a run are joined
        segment: merge and start again after this many units
        beta: how far skips reach back, from 0 (the network before rewiring) to 1 (the paper)
        frames: frames of the clip to count memory for; what the network was trained on by default
        size: rows and columns of these frames; what the network was trained on by default
    """
    config = BackboneConfig(name=model, weights=weights, unit=unit, merge=merge, segment=segment, beta=beta)
    backbone = build_backbone(replace(config, rewired=False))
    num_frames, rows_columns = _native_clip(backbone)
    num_frames, rows_columns = frames or num_frames, size or rows_columns
    plain = kept_bytes(backbone, num_frames=num_frames, size=rows_columns)
    # A family may prepare its blocks for being rewired, so the other figures are of a backbone built for that.
    backbone = build_backbone(config)
    unrewire(backbone)
    report = rewire_in_place(backbone, config=RewiringConfig(unit=unit, merge=merge, segment=segment, beta=beta))
    rewired = kept_bytes(backbone, num_frames=num_frames, size=rows_columns)
    millions = sum(parameter.numel() for parameter in backbone.parameters()) / 1e6
    step = "every frame" if backbone.frames_per_step == 1 else f"every {backbone.frames_per_step} frames"
    print(f"{model}: {millions:.1f} million parameters; {backbone.out_channels} channels {step}\n\n{report}")
    print(
        f"\nkept from forward to backward for {num_frames} frames of {rows_columns[0]} x {rows_columns[1]}, float32: "
        f"{plain / 2**20:.2f} MiB plain, {rewired / 2**20:.2f} MiB rewired"
    )


def _native_clip(backbone: VideoBackbone) -> tuple[int, tuple[int, int]]:
    if isinstance(backbone, ClipwiseBackbone):
        return backbone.encoder.clip_frames, backbone.encoder.size
    return 32, (224, 224)
