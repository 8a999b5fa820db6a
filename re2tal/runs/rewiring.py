"""What of a backbone becomes reversible, what does not and why, and how much less it keeps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from re2tal.backbones import BACKBONES, BackboneConfig, build_backbone
from re2tal.backbones.base import VideoBackbone
from re2tal.backbones.hub.tiling import ClipwiseBackbone
from re2tal.planning.footprint import kept_bytes, kept_bytes_of
from re2tal.rewire import RewireReport, RewiringConfig, check_same_network, rewire, unrewire


class Rewired(NamedTuple):
    """A network before and after."""

    about: str
    """What network it is."""
    report: RewireReport
    """What was rewired, what was left alone and why."""
    plain_bytes: int
    """Kept from forward to backward before."""
    rewired_bytes: int
    """Kept after."""
    clip: str
    """What these are counted for."""

    def __str__(self) -> str:
        return (
            f"{self.about}\n\n{self.report}\n\nkept from forward to backward for {self.clip}, float32: "
            f"{self.plain_bytes / 2**20:.2f} MiB plain, {self.rewired_bytes / 2**20:.2f} MiB rewired"
        )


def rewire_and_count(
    model: str,
    wiring: RewiringConfig,
    *,
    weights: str | None = None,
    frames: int | None = None,
    size: tuple[int, int] | None = None,
) -> Rewired:
    """Rewire a backbone, or any model of the transformers library, and count the memory of both.

    Raises RewireError where the rewired network, at beta 0, is not the plain one.
    """
    if model not in BACKBONES and ("/" in model or Path(model).is_dir()):
        if weights is not None:
            raise ValueError(f"weights is {weights!r}, but {model!r} brings its own; leave it out")
        return _rewire_any(model, wiring, num_frames=frames, size=size)
    config = BackboneConfig(
        name=model, weights=weights, unit=wiring.unit, merge=wiring.merge, segment=wiring.segment, beta=wiring.beta
    )
    backbone = build_backbone(replace(config, rewired=False))
    num_frames, rows_columns = _native_clip(backbone)
    num_frames, rows_columns = frames or num_frames, size or rows_columns
    plain = kept_bytes(backbone, num_frames=num_frames, size=rows_columns)
    # A family may prepare its blocks for being rewired, so the other figures are of a backbone built for that.
    backbone = build_backbone(config)
    # Built rewired with the family's own wiring; from here on it is the one that was asked for.
    unrewire(backbone)
    report = rewire(backbone, config=wiring)
    check_same_network(backbone, example_of(backbone))
    rewired = kept_bytes(backbone, num_frames=num_frames, size=rows_columns)
    step = "every frame" if backbone.frames_per_step == 1 else f"every {backbone.frames_per_step} frames"
    about = f"{model}: {_millions(backbone):.1f} million parameters; {backbone.out_channels} channels {step}"
    frames_of = "one frame" if num_frames == 1 else f"{num_frames} frames"
    return Rewired(about, report, plain, rewired, f"{frames_of} of {rows_columns[0]} x {rows_columns[1]}")


def _rewire_any(name: str, wiring: RewiringConfig, *, num_frames: int | None, size: tuple[int, int] | None) -> Rewired:
    from re2tal.backbones.hub.any_model import example_shape, load_any_model  # the library takes seconds to import

    model = load_any_model(name)
    shape = example_shape(model, num_frames=num_frames, size=size)
    plain = kept_bytes_of(model, lambda: (torch.zeros(shape),))
    # Noise and not zeros: with zeros different networks may give equal outputs.
    # Seeded: the same model gives the same report.
    example = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    report = rewire(model, config=wiring, example=(example,))
    rewired = kept_bytes_of(model, lambda: (torch.zeros(shape),))
    about = f"{name}: {type(model).__name__}, {_millions(model):.1f} million parameters"
    what = f"{shape[1]} frames" if len(shape) == 5 else "one picture"
    return Rewired(about, report, plain, rewired, f"{what} of {shape[-2]} x {shape[-1]}")


def example_of(backbone: VideoBackbone) -> tuple[Tensor, Tensor]:
    """A clip on which to compare both forms: of few pixels, because that costs seconds and shows as much."""
    num_frames, (rows, columns) = 16, (64, 64)
    if isinstance(backbone, ClipwiseBackbone):
        encoder = backbone.encoder
        num_frames, (rows, columns) = encoder.clip_frames, (4 * encoder.patch[1], 4 * encoder.patch[2])
    frames = torch.randn(1, 3, num_frames, rows, columns, generator=torch.Generator().manual_seed(0))
    return frames, torch.ones(1, num_frames, dtype=torch.bool)


def _millions(model: nn.Module) -> float:
    return sum(parameter.numel() for parameter in model.parameters()) / 1e6


def _native_clip(backbone: VideoBackbone) -> tuple[int, tuple[int, int]]:
    if isinstance(backbone, ClipwiseBackbone):
        return backbone.encoder.clip_frames, backbone.encoder.size
    # As Video Swin and SlowFast are published; they take other sizes too.
    return 32, (224, 224)
