"""What the monitors of a rewired network found."""

from __future__ import annotations

from torch import nn

from re2tal.reversible.monitor import Reading
from re2tal.rewire.stage import RewiredStage


def worst_reading(model: nn.Module) -> Reading | None:
    """The largest drift and the largest share outside of the grid, each of the step in which it was last looked for.

    None where nothing is watched, or was not yet.
    """
    worst: Reading | None = None
    for module in model.modules():
        if isinstance(module, RewiredStage) and module.monitor is not None and module.monitor.reading is not None:
            worst = module.monitor.reading.or_worse(worst)
    return worst
