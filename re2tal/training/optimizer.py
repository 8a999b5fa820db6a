"""AdamW or Adam over four groups: (backbone | localizer or classifier) x (decayed | not decayed).

A pretrained backbone learns more slowly than the fresh part above it; what shifts or scales (biases, norms,
position tables) is not pulled towards zero.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from re2tal.options import COUNT, NOT_NEGATIVE, RATE, check_ranges, option

TABLES = ("relative_position_bias_table", "position_embedding", "pos_embed", "cls_token")
"""Last names of parameters with more than one dimension that are learned offsets, not maps."""

ALGORITHMS: dict[str, type[torch.optim.Adam]] = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}
"""Of these AdamW is the kind of Adam with decoupled weight decay, in torch too."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW or Adam. Defaults: Re2TAL on THUMOS-14."""

    algorithm: Literal["adamw", "adam"] = "adamw"
    """"adamw" takes the weight decay off the weights; "adam" adds it to the gradients, as VSGN was trained."""

    learning_rate: float = option(1e-4, within=NOT_NEGATIVE, resumable=True)
    """Peak learning rate of the localizer or classifier."""
    backbone_learning_rate: float = option(1e-5, within=NOT_NEGATIVE, resumable=True)
    """Peak learning rate of the backbone."""
    weight_decay: float = option(0.05, within=NOT_NEGATIVE)
    """Weight decay of the decayed groups."""
    beta1: float = option(0.9, within=RATE)
    """Decay of the gradient's mean."""
    beta2: float = option(0.999, within=RATE)
    """Decay of the squared gradient's mean."""
    made_for_clips: int | None = option(None, within=COUNT, resumable=True, planned=False)
    """Clips per optimizer step, of all ranks together, for which the learning rates were chosen; the log compares."""
    follow_batch: bool = option(False, planned=False)
    """Multiply the learning rates by clips per step / `made_for_clips`. Without, they stay whatever the batch is."""

    def __post_init__(self) -> None:
        if self.algorithm not in ALGORITHMS:
            raise ValueError(f"optimizer.algorithm is {self.algorithm!r}; known: {list(ALGORITHMS)}")
        check_ranges(self, "optimizer")
        if self.follow_batch and self.made_for_clips is None:
            raise ValueError(
                "optimizer.follow_batch is set, but optimizer.made_for_clips does not say for how many clips per step "
                "the learning rates were chosen; give it, or leave follow_batch out"
            )


def for_batch(config: OptimizerConfig, *, clips: int) -> tuple[OptimizerConfig, str | None]:
    """`config` for steps of `clips` clips, and a sentence on its learning rates where that is another number than they
    were made for."""
    if config.made_for_clips in (None, clips):
        return config, None
    share = clips / config.made_for_clips
    about = f"learning rates are made for {config.made_for_clips} clips per optimizer step, and here a step has {clips}"
    if not config.follow_batch:
        return config, f"{about}; they stay as they are (--optimizer.follow-batch multiplies them by {share:.4g})"
    config = replace(
        config, learning_rate=config.learning_rate * share, backbone_learning_rate=config.backbone_learning_rate * share
    )
    return config, f"{about}: they are multiplied by {share:.4g}, to {config.learning_rate:.4g} at their peak"


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Adam:
    """The algorithm that `config` names, over `parameter_groups`."""
    return ALGORITHMS[config.algorithm](parameter_groups(model, config), betas=(config.beta1, config.beta2))


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """The trainable parameters of `model`, each in exactly one named group; frozen ones in none, empty groups left out.

    Parameters under `model.backbone` take the backbone's learning rate. Raises ValueError when nothing is trainable.
    """
    # By id: a parameter that modules share has several names, and one place in the groups.
    undecayed = _not_decayed(model)
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part = name.partition(".")[0]
        decayed = id(parameter) not in undecayed
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
        # By the type's name, as every library has norms of its own.
        if name == "bias" or name in TABLES or parameter.ndim <= 1 or "Norm" in type(module).__name__
    }
