"""The worst drift that the monitors of a rewired network found."""

from __future__ import annotations

from torch import nn

from re2tal.reversible.monitor import Reading
from re2tal.rewire.stage import RewiredStage


def largest_drift(model: nn.Module) -> Reading | None:
    """The largest drift, and the largest share outside of the grid, over all stages, from each one's last checked step.

    None if no stage is monitored, or none was checked yet.
    """
    worst: Reading | None = None
    for module in model.modules():
        if isinstance(module, RewiredStage) and module.monitor is not None and module.monitor.reading is not None:
            worst = module.monitor.reading.or_worse(worst)
    return worst
