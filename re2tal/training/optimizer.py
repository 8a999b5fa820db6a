"""AdamW over four groups: (backbone | localizer or classifier) x (decayed | not decayed).

A pretrained backbone learns more slowly than the fresh part above it; what shifts or scales (biases, norms,
position tables) is not pulled towards zero.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from re2tal.options import option

TABLES = ("relative_position_bias_table", "position_embedding", "pos_embed", "cls_token")
"""Last names of parameters with more than one dimension that are learned offsets, not maps."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW. Defaults: Re2TAL on THUMOS-14."""

    learning_rate: float = option(1e-4, resumable=True)
    """Peak learning rate of the localizer or classifier."""
    backbone_learning_rate: float = option(1e-5, resumable=True)
    """Peak learning rate of the backbone."""
    weight_decay: float = 0.05
    """Decoupled weight decay of the decayed groups."""
    beta1: float = 0.9
    """Decay of the gradient's mean."""
    beta2: float = 0.999
    """Decay of the squared gradient's mean."""

    def __post_init__(self) -> None:
        for name in ("learning_rate", "backbone_learning_rate", "weight_decay"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"optimizer.{name} is {value}; it must be a finite number, not negative")
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise ValueError(f"optimizer.beta1 and beta2 are {self.beta1} and {self.beta2}; both lie in [0, 1)")


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`."""
    return torch.optim.AdamW(parameter_groups(model, config), betas=(config.beta1, config.beta2))


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """The trainable parameters of `model`, each in exactly one named group; frozen ones in none, empty groups left out.

    Parameters under `model.backbone` take the backbone's learning rate. Raises ValueError when nothing is trainable.
    """
    kept_whole = _not_decayed(model)
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part = name.partition(".")[0]
        decayed = id(parameter) not in kept_whole
        group = groups.setdefault(
            f"{part}, {'decayed' if decayed else 'not decayed'}",
            {
                "params": [],
                "lr": config.backbone_learning_rate if part == "backbone" else config.learning_rate,
                "weight_decay": config.weight_decay if decayed else 0.0,
            },
        )
        group["params"].append(parameter)
    if not groups:
        raise ValueError(
            "no parameter of the model requires a gradient; set backbone.frozen = false or unfreeze the localizer"
        )
    grouped = sum(len(group["params"]) for group in groups.values())
    assert grouped == sum(parameter.requires_grad for parameter in model.parameters())
    return [{"name": name, **group} for name, group in groups.items()]


def _not_decayed(model: nn.Module) -> set[int]:
    """Ids of parameters that shift or scale: biases, vectors, scalars, tables, and norms, whatever their shape."""
    return {
        id(parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if name == "bias" or name in TABLES or parameter.ndim <= 1 or "Norm" in type(module).__name__
    }
