"""The device of commands that were given none."""

from __future__ import annotations

import torch


def default_device() -> torch.device:
    """The accelerator, if there is one; a build of torch for CUDA names it on machines without a GPU too."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
