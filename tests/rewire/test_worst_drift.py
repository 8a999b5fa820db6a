"""Monitors of a rewired network: one for each stage, by its name, and the worst of their readings."""

from __future__ import annotations

import copy

import pytest
import torch
from rewire.networks import Block, Caller, frames, seeded, walker

from re2tal.reversible.monitor import Reading
from re2tal.rewire import RewiringConfig, largest_drift, rewire


def test_every_stage_is_watched_under_its_name() -> None:
    net = seeded(Caller).float()
    rewire(net, config=RewiringConfig(monitor_every=2, grid=2**-10, segment=2))
    for step in range(4):
        assert (largest_drift(net) is None) == (step < 2)
        net(frames().float()).sum().backward()
        with torch.no_grad():
            net(frames().float())  # evaluation counts for nothing
    assert [stage.monitor.name for stage in net.stages] == ["stages.0", "stages.1"]
    assert largest_drift(net) == Reading(0.0, 0.0)
    net.stages[1].monitor.reading = Reading(0.25, 0.5)
    assert largest_drift(copy.deepcopy(net)) == Reading(0.25, 0.5)


def test_networks_that_nobody_watches_have_no_readings() -> None:
    net = walker(Block)
    assert largest_drift(net) is None
    rewire(net)
    net(frames()).sum().backward()
    assert largest_drift(net) is None


def test_a_number_of_steps_without_meaning_is_refused() -> None:
    with pytest.raises(ValueError, match="monitor_every is 0; give a number of steps, or None for never"):
        RewiringConfig(monitor_every=0)
