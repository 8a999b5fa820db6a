"""The states of every global random generator of this process: python's, NumPy's, torch's and the device's.

Dropout and drop path draw from them, so a resumed run is the same run only if they continue where they stopped.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def seed_generators(seed: int, *, rank: int) -> None:
    """Seeds them all. Only a training or extraction run calls it; other ranks then drop other paths."""
    # NumPy takes 32 bits; the factor keeps the seeds of neighbouring runs and of neighbouring ranks apart.
    mixed = (seed * 1_000_003 + rank) % 2**32
    random.seed(mixed)
    np.random.seed(mixed)
    torch.manual_seed(mixed)


def generator_states(device: torch.device) -> dict[str, Any]:
    """Their states, made of numbers and tensors only, so that they load without unpickling objects."""
    numpy_state: Any = np.random.get_state(legacy=False)
    states = {
        "python": random.getstate(),
        "numpy": {
            "key": torch.from_numpy(numpy_state["state"]["key"].astype(np.int64)),
            "position": int(numpy_state["state"]["pos"]),
            "has_gauss": int(numpy_state["has_gauss"]),
            "gauss": float(numpy_state["gauss"]),
        },
        "torch": torch.get_rng_state(),
    }
    if device.type != "cpu":
        states["device"] = torch.get_device_module(device).get_rng_state(device)
    return states


def restore_generators(states: dict[str, Any], device: torch.device) -> None:
    """Puts back what `generator_states` gave."""
    random.setstate(states["python"])
    saved = states["numpy"]
    key = saved["key"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", key, saved["position"], saved["has_gauss"], saved["gauss"]))
    torch.set_rng_state(states["torch"].cpu())
    if device.type != "cpu":
        if "device" not in states:
            raise ValueError(
                f"the checkpoint was written on a CPU and holds no generator state for {device}; resume on a CPU"
            )
        torch.get_device_module(device).set_rng_state(states["device"].cpu(), device)
