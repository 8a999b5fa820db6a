"""`re2tal rewire`: what of a backbone becomes reversible, what does not and why, and how much less it keeps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from torch import nn

from re2tal.backbones import BACKBONES, BackboneConfig, build_backbone
from re2tal.backbones.base import VideoBackbone
from re2tal.backbones.hub.tiling import ClipwiseBackbone
from re2tal.planning.footprint import kept_bytes, kept_bytes_of
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
        model: name of a backbone, such as videomae_base; or any picture or video model of the transformers library, by
            its folder or as OWNER/NAME
        weights: a hub name, folder or file, checked and loaded first; a model of the library brings its own
        unit: couple branches of blocks, or whole blocks
        merge: how the two end states of a run are joined
        segment: merge and start again after this many units
        beta: how far skips reach back, from 0 (the network before rewiring) to 1 (the paper)
        frames: frames of the clip to count memory for; what the network was trained on by default
        size: rows and columns of these frames; what the network was trained on by default
    """
    if frames is not None and frames < 1:
        raise ValueError(f"--frames is {frames}; give 1 or more, or leave it out")
    if size is not None and min(size) < 1:
        raise ValueError(f"--size is {size[0]} {size[1]}; give rows and columns of 1 or more, or leave it out")
    wiring = RewiringConfig(unit=unit, merge=merge, segment=segment, beta=beta)
    if model not in BACKBONES and ("/" in model or Path(model).is_dir()):
        if weights is not None:
            raise ValueError(f"weights is {weights!r}, but {model!r} brings its own; leave it out")
        _rewire_any(model, wiring, num_frames=frames, size=size)
        return
    config = BackboneConfig(name=model, weights=weights, unit=unit, merge=merge, segment=segment, beta=beta)
    backbone = build_backbone(replace(config, rewired=False))
    num_frames, rows_columns = _native_clip(backbone)
    num_frames, rows_columns = frames or num_frames, size or rows_columns
    plain = kept_bytes(backbone, num_frames=num_frames, size=rows_columns)
    # A family may prepare its blocks for being rewired, so the other figures are of a backbone built for that.
    backbone = build_backbone(config)
    unrewire(backbone)
    report = rewire_in_place(backbone, config=wiring)
    rewired = kept_bytes(backbone, num_frames=num_frames, size=rows_columns)
    step = "every frame" if backbone.frames_per_step == 1 else f"every {backbone.frames_per_step} frames"
    print(f"{model}: {_millions(backbone):.1f} million parameters; {backbone.out_channels} channels {step}\n\n{report}")
    frames_of = "one frame" if num_frames == 1 else f"{num_frames} frames"
    _print_kept(plain, rewired, f"{frames_of} of {rows_columns[0]} x {rows_columns[1]}")


def _rewire_any(name: str, wiring: RewiringConfig, *, num_frames: int | None, size: tuple[int, int] | None) -> None:
    from re2tal.backbones.hub.any_model import example_shape, load_any_model  # the library takes seconds to import

    model = load_any_model(name)
    shape = example_shape(model, num_frames=num_frames, size=size)
    plain = kept_bytes_of(model, lambda: (torch.zeros(shape),))
    example = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    report = rewire_in_place(model, config=wiring, example=(example,))
    rewired = kept_bytes_of(model, lambda: (torch.zeros(shape),))
    print(f"{name}: {type(model).__name__}, {_millions(model):.1f} million parameters\n\n{report}")
    what = f"{shape[1]} frames" if len(shape) == 5 else "one picture"
    _print_kept(plain, rewired, f"{what} of {shape[-2]} x {shape[-1]}")


def _millions(model: nn.Module) -> float:
    return sum(parameter.numel() for parameter in model.parameters()) / 1e6


def _print_kept(plain: int, rewired: int, what: str) -> None:
    print(
        f"\nkept from forward to backward for {what}, float32: "
        f"{plain / 2**20:.2f} MiB plain, {rewired / 2**20:.2f} MiB rewired"
    )


def _native_clip(backbone: VideoBackbone) -> tuple[int, tuple[int, int]]:
    if isinstance(backbone, ClipwiseBackbone):
        return backbone.encoder.clip_frames, backbone.encoder.size
    return 32, (224, 224)
