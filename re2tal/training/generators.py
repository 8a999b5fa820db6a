"""Seeds of the global random generators of this process: python's, NumPy's, torch's and the device's.

Initial weights, dropout and drop path draw from them. A training step seeds them anew for each batch, so no state of a
generator has to be saved.
"""

from __future__ import annotations

import random

import numpy as np
import torch


def seed_generators(seed: int) -> None:
    """Seeds them all, alike on every rank. Only a training or extraction run calls it."""
    # The factor stays: the initial weights of every seeded run depend on it.
    _seed(seed * 1_000_003)


def seed_draws(seed: int, batch: int) -> None:
    """Seeds them all for the forward of a `batch`, by its number among those of all ranks and steps of a run."""
    # 2 keeps these apart from what else draws by place: colours, and which clips are trained.
    _seed(int(np.random.SeedSequence([seed, 2, batch]).generate_state(1)[0]))


def _seed(number: int) -> None:
    mixed = number % 2**32  # NumPy takes no more
    random.seed(mixed)
    np.random.seed(mixed)
    torch.manual_seed(mixed)
