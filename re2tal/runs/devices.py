"""The device of commands: one by its name, or one of their own choice."""

from __future__ import annotations

import torch


def default_device() -> torch.device:
    """The accelerator, if there is one; a build of torch for CUDA names it on machines without a GPU too."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def named_device(name: torch.device | str | None) -> torch.device:
    """The device of this name, the default one without. ValueError where this machine has none such."""
    if not name:
        return default_device()
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    # torch has no one class for this: a build without CUDA fails an assertion.
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device is {str(name)!r}, which cannot be had here ({str(error).partition(chr(10))[0]}); give cpu, cuda, "
            "cuda:1, ..., or leave it out"
        ) from None
    return device
