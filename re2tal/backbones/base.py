"""The contract that every video backbone publishes, and the configuration that builds one.

A backbone maps normalised RGB frames to one feature vector per `frames_per_step` frames:

    (B, 3, T, H, W) float, (B, T) bool  ->  Features: (B, out_channels, T / frames_per_step) float and its mask

T may be any number of frames that fills a step. H and W may be any size that the family knows how to pad, as its
pretrained ancestors do; one bound to whole patches raises ValueError for the rest.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from re2tal.options import option
from re2tal.rewire import RewiringConfig
from re2tal.structures import Features


@dataclass(frozen=True)
class BackboneConfig:
    """Which backbone to build, from which weights, and how it trains."""

    name: str = "swin3d_tiny"
    """A row of re2tal.backbones.BACKBONES, or "features" for no network at all, on stored features."""
    feature_channels: int | None = None
    """Of "features" only: how many channels they have."""
    rewired: bool = True
    """Give every residual run its two streams (reversible); parameter names do not change."""
    recompute: bool = True
    """Forget activations inside rewired runs, and in the layers between them, and compute them again in backward;
    needs `rewired`."""
    unit: Literal["branch", "block"] = option("branch", wiring=True)
    """What a rewired run couples: the branches of its blocks (the paper), or whole blocks, F(x) = block(x) - x."""
    merge: Literal["mean", "extrapolate"] = option("mean", wiring=True)
    """How a rewired run joins its two end states: their mean (the paper), or y1 + y2 - x, nearer to a plain one."""
    beta: float = option(1.0, wiring=True, of_rewired=True)
    """How far the skips of a rewired run reach back: x[i+1] = F(x[i]) + (1 - beta) x[i] + beta x[i-1]. 1 is the paper's
    coupling, 0 the network before rewiring (SlowFast's with `unit` "block"). It is where training ends, and what the
    trained network is used with; `annealing` says how it gets there."""
    segment: int | None = option(None, wiring=True, of_rewired=True)
    """Merge and start again after this many units; None for one run per stage (the paper)."""
    chunk_mebibytes: float | None = option(None, of_rewired=True)
    """Run branches in pieces that need about so much memory each while they are differentiated: less memory, more and
    smaller kernels. None runs them whole. Needs `rewired`, `unit` "branch" and, in SlowFast, `norm_eval`."""
    known: int = option(0, of_rewired=True)
    """How many branches of each rewired run keep what they added: of those that end in a linear layer the most
    expensive, so MLPs first. That layer, a third of a transformer's block in its MLP, is then not computed again. Each
    takes the memory of a state, in bf16 and fp16 of half a state. Needs `rewired` and `recompute`."""
    keep_nonresidual: bool = option(False, of_rewired=True, resumable=True, planned=False)
    """Keep the activations of those blocks of a stage that are not residual, in SlowFast the first of each: more
    memory, and they are not computed again. Needs `rewired`."""
    offload: bool = option(False, of_rewired=True, resumable=True, planned=False)
    """Keep what rewired runs keep, two states each, in host memory between forward and backward. Needs `rewired` and
    `recompute`; on a CPU it saves nothing."""
    states: Literal["float32", "int32"] = option("float32", of_rewired=True)
    """What the states of a rewired run are made of: "float32" or "int32". Both are rebuilt exactly on a grid (see
    `grid`)."""
    grid: float | Literal["auto"] | None = "auto"
    """The step to which states are rounded, so that they are rebuilt to the last bit. "auto" is 2**-14 in bf16 and
    fp16; in fp32 2**-18 for SlowFast, whose ReLUs an error of a rounding turns on or off, and none for the smooth
    families; for "int32" states 2**-16. None is none, and rebuilds with an error."""
    monitor_every: int | None = option(100, resumable=True, planned=False)
    """After so many forwards of training, again and again, compare a sample of what rewired runs rebuild with what they
    forgot, and warn where they differ; `metrics.jsonl` has the figures. None for never."""
    weights: str | None = option(None, planned=False)
    """Pretrained weights: a .safetensors or .pth file in any layout the family reads, or, for a family of the
    transformers library, a hub name or a folder. None starts from random weights."""
    drop_path: float = 0.0
    """Drop-path rate of the last block; it grows linearly from 0 at the first. Only families with drop-path take it."""
    frames_per_step: int | None = None
    """How many frames one step of the features stands for, in a family that offers a choice (SlowFast: divisors of its
    slow stride); None is the family's own."""
    frozen: bool = False
    """Train nothing in the backbone and keep all of it in evaluation mode."""
    norm_eval: bool = False
    """Keep normalisation layers in evaluation mode and their scale and shift frozen, as Re2TAL's recipes do."""

    def __post_init__(self) -> None:
        for name in ("feature_channels", "frames_per_step"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"backbone.{name} is {value}; give at least 1, or None")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"backbone.drop_path is {self.drop_path}; give a rate of at least 0 and below 1")
        if self.rewired:
            self.rewiring()

    def rewiring(self) -> RewiringConfig:
        """How the backbone is rewired. Raises ValueError, with the key, where that cannot be."""
        # Only a plan stores units: how many there are is not known here.
        shared = [field.name for field in fields(RewiringConfig) if field.name != "stored"]
        try:
            return RewiringConfig(**{name: getattr(self, name) for name in shared})
        except ValueError as error:
            names_its_key = str(error).split()[0] in shared
            raise ValueError(f"backbone{'.' if names_its_key else ': '}{error}") from None


class VideoBackbone(nn.Module, ABC):
    """A network that turns frames into a sequence of feature vectors.

    `frozen` and `norms_frozen` outlive `train()`, whoever calls it; set them through `freeze` and `freeze_norms`.
    """

    out_channels: int
    frames_per_step: int
    frozen: bool = False
    norms_frozen: bool = False

    @abstractmethod
    def forward(self, frames: Tensor, mask: Tensor) -> Features:
        """(B, 3, T, H, W) normalised float frames and their (B, T) bool mask -> Features (B, C, T')."""

    def train(self, mode: bool = True) -> VideoBackbone:
        """As `nn.Module.train`, except that what was frozen stays in evaluation mode."""
        super().train(mode and not self.frozen)
        if self.norms_frozen:
            for norm in norm_layers(self):
                norm.train(False)
        return self


def steps_mask(mask: Tensor, *, frames_per_step: int) -> Tensor:
    """(B, T) bool over frames -> (B, ceil(T / frames_per_step)) bool: a step is valid where any of its frames is."""
    padded = F.pad(mask, (0, -mask.shape[1] % frames_per_step), value=False)
    return padded.unflatten(1, (-1, frames_per_step)).any(dim=2)


def freeze(backbone: VideoBackbone) -> None:
    """No gradients and evaluation mode for the whole backbone, for good. Call it before the optimizer is made."""
    backbone.frozen = True
    backbone.requires_grad_(False)
    backbone.train(backbone.training)


def freeze_norms(backbone: VideoBackbone) -> None:
    """The same for its normalisation layers only. Call it before the optimizer is made."""
    backbone.norms_frozen = True
    for norm in norm_layers(backbone):
        norm.requires_grad_(False)
    backbone.train(backbone.training)


def norm_layers(module: nn.Module) -> Iterator[nn.Module]:
    """Every normalisation layer inside `module`: layer, group, RMS, batch and instance norms."""
    kinds = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, _NormBase)
    return (layer for layer in module.modules() if isinstance(layer, kinds))
