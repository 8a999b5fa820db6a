"""Refuses to train weights that hold NaN or infinity: the first loss would, and no learning rate helps."""

from __future__ import annotations

import torch
from torch import nn


def check_finite(model: nn.Module) -> None:
    """Raises ValueError where a parameter of `model` is not finite. Waits for the device once."""
    named = list(model.named_parameters())
    counts = [(~torch.isfinite(parameter.detach())).sum() for _, parameter in named]
    bad = [] if not counts else torch.stack(counts).tolist()
    odd = [(name, count, parameter.numel()) for (name, parameter), count in zip(named, bad, strict=True) if count]
    if odd:
        name, count, size = odd[0]
        raise ValueError(
            f"before the first step, {len(odd)} of {len(named)} parameters hold NaN or infinity, such as {name} in "
            f"{count} of {size} elements: the weights that training starts from are broken; use another file, or one "
            "from before that run diverged"
        )
