"""The worst drift that the monitors of a rewired network found."""

from __future__ import annotations

from torch import nn

from re2tal.reversible.monitor import Reading
from re2tal.rewire.stage import stages_of


def largest_drift(model: nn.Module) -> Reading | None:
    """The largest drift, and the largest share outside of the grid, over all stages, from each one's last checked step.

    None if no stage is monitored, or none was checked yet.
    """
    worst: Reading | None = None
    for stage in stages_of(model).values():
        if stage.monitor is not None and stage.monitor.reading is not None:
            worst = stage.monitor.reading.or_worse(worst)
    return worst
