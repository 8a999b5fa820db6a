"""The contract that every video backbone publishes, and the configuration that builds one.

A backbone maps normalised RGB frames to one feature vector per `frames_per_step` frames:

    (B, 3, T, H, W) float, (B, T) bool  ->  Features: (B, out_channels, T / frames_per_step) float and its mask

T may be any number of frames that fills a step. H and W may be any size that the family knows how to pad, as its
pretrained ancestors do; one bound to whole patches raises ValueError for the rest.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Literal, get_args

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from re2tal.options import option
from re2tal.rewire import RewiringConfig
from re2tal.structures import Features

Adapter = Literal["none", "temporal", "lora"]


@dataclass(frozen=True)
class BackboneConfig(RewiringConfig):
    """Which backbone to build, from which weights, how it trains, and how it is rewired if it is."""

    name: str = "swin3d_tiny"
    """A row of re2tal.backbones.BACKBONES, or "features" for no network at all, on stored features."""
    feature_channels: int | None = None
    """Of "features" only: how many channels they have."""
    rewired: bool = True
    """Make every run of residual blocks reversible. Parameter names do not change."""
    weights: str | None = option(None, planned=False)
    """Pretrained weights: a .safetensors or .pth file in any layout the family reads, or, for a family of the
    transformers library, a hub name or a folder. None starts from random weights."""
    drop_path: float = 0.0
    """Drop-path rate of the last block; it grows linearly from 0 at the first. Only families with drop-path take it."""
    frames_per_step: int | None = None
    """How many frames one step of the features stands for, in a family that offers a choice (SlowFast: divisors of its
    slow stride); None is the family's own."""
    clips_at_once: int | None = None
    """Of families that cut video into clips: encode so many at a time, at least one of each video of a batch, and again
    in backward. Memory then grows with the length of videos by their frames and features alone, for one more forward;
    gradients are the same, and drop-path draws in another order. None is all at once."""
    trained_clips: float = 1.0
    """Of the same families: the share of a video's clips that a step trains, as TALLFormer does. The others take their
    features from a memory in the run folder, which is an approximation. For whole videos (ResizeWhole): windows that
    start at random places show no clip twice. A resumed run goes on with the memory as it is, so not to the bit."""
    frozen: bool = False
    """Train nothing in the backbone and keep all of it in evaluation mode."""
    norm_eval: bool = False
    """Keep normalisation layers in evaluation mode, with frozen scale and shift, as Re2TAL's recipes do."""
    adapter: Adapter = "none"
    """What learns in the place of the backbone, which is frozen: "temporal" are AdaTAD's convolutions over the whole
    window behind every block (VideoMAE), whose features then end without a norm; "lora" are low-rank updates of linear
    layers (any family; needs the peft package)."""
    adapter_blocks: tuple[int, ...] | None = None
    """Of "temporal": the blocks that have one, counted from 0; None is all of them."""
    adapter_ratio: float = 0.25
    """Of "temporal": inner width as a share of the backbone's."""
    lora_rank: int = 8
    """Of "lora": rank of the update."""
    lora_alpha: float = 16.0
    """Of "lora": the update is multiplied by alpha / rank."""
    lora_targets: tuple[str, ...] = ("query", "value")
    """Of "lora": the last names of the linear layers that it updates; for Video Swin, for example, qkv and proj."""

    def __post_init__(self) -> None:
        for name in ("feature_channels", "frames_per_step", "clips_at_once"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"backbone.{name} is {value}; give at least 1, or None")
        if not 0 < self.trained_clips <= 1:
            raise ValueError(f"backbone.trained_clips is {self.trained_clips}; give a share above 0, and at most 1")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"backbone.drop_path is {self.drop_path}; give a rate of at least 0 and below 1")
        self._check_adapter()
        try:
            super().__post_init__()
        except ValueError as error:
            names_its_key = str(error).split()[0] in (field.name for field in fields(self))
            raise ValueError(f"backbone{'.' if names_its_key else ': '}{error}") from None

    def _check_adapter(self) -> None:
        if self.adapter not in get_args(Adapter):
            raise ValueError(f"backbone.adapter is {self.adapter!r}; known: {list(get_args(Adapter))}")
        if self.adapter != "none" and self.frozen:
            raise ValueError(
                f"backbone.adapter {self.adapter!r} trains, and backbone.frozen trains nothing in the backbone; leave "
                "frozen out (adapters freeze the rest of it), or set adapter to 'none'"
            )
        if not 0 < self.adapter_ratio <= 4:
            raise ValueError(f"backbone.adapter_ratio is {self.adapter_ratio}; give a share above 0, and at most 4")
        if self.lora_rank < 1 or not self.lora_alpha > 0:
            raise ValueError(
                f"backbone.lora_rank is {self.lora_rank} and lora_alpha {self.lora_alpha}; give a rank of at least 1 "
                "and an alpha above 0"
            )
        for option_name, kind in ADAPTER_OF.items():
            default = next(field.default for field in fields(self) if field.name == option_name)
            if kind != self.adapter and getattr(self, option_name) != default:
                raise ValueError(
                    f"backbone.{option_name} is {getattr(self, option_name)!r}, but backbone.adapter is "
                    f"{self.adapter!r}; set it to {kind!r}, or leave {option_name} out"
                )

    def rewiring(self) -> RewiringConfig:
        """The part of it that `rewire` takes."""
        return RewiringConfig(**{field.name: getattr(self, field.name) for field in fields(RewiringConfig)})


ADAPTER_OF: dict[str, Adapter] = {
    **dict.fromkeys(("adapter_blocks", "adapter_ratio"), "temporal"),
    **dict.fromkeys(("lora_rank", "lora_alpha", "lora_targets"), "lora"),
}
"""The kind of adapter that each option belongs to."""


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
        """As `nn.Module.train`; frozen parts stay in evaluation mode."""
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
    """Freezes the whole backbone: no gradients, evaluation mode for good. Call it before the optimizer is made."""
    backbone.frozen = True
    backbone.requires_grad_(False)
    backbone.train(backbone.training)


def freeze_but(backbone: VideoBackbone, trained: Iterable[nn.Parameter]) -> None:
    """Trains nothing in the backbone but `trained`. Modes stay: drop-path still drops branches of frozen blocks, as in
    AdaTAD. Call it before the optimizer is made."""
    backbone.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)


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
