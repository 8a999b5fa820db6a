"""Where a rewired network stands on the way from the network that it was (beta = 0) to the paper's coupling (beta = 1).

    x[i+1] = F_i(x[i]) + (1 - beta) x[i] + beta x[i-1]

`reversible.coupling` has the algebra. No parameter depends on beta, so it can change between any two steps of training.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from re2tal.options import names_with
from re2tal.rewire.runs_of_stage import StateCount, state_count
from re2tal.rewire.stage import stages_of


def set_beta(model: nn.Module, beta: float) -> None:
    """For every rewired stage in `model`, from its next forward on. Raises ValueError where there is none."""
    stages = stages_of(model).values()
    if not stages:
        raise ValueError(f"this {type(model).__name__} has no beta: nothing in it is rewired; call rewire(model) first")
    for stage in stages:
        stage.config = replace(stage.config, beta=beta)


def beta_of(model: nn.Module) -> float | None:
    """Of all rewired stages in `model`; None where there is none. Raises ValueError where they differ."""
    found = {stage.config.beta for stage in stages_of(model).values()}
    if len(found) > 1:
        raise ValueError(f"the rewired stages of this {type(model).__name__} have beta {sorted(found)}; set it for all")
    return found.pop() if found else None


def wiring_of(model: nn.Module) -> dict[str, Any] | None:
    """What the function of a rewired network depends on beside its weights: `unit`, `merge`, `segment`, `beta`, `ends`.

    `ends` are the blocks behind which an example made a run end. None where nothing is rewired. Raises ValueError where
    stages differ in beta.
    """
    stages = stages_of(model).values()
    if not stages:
        return None
    config = next(iter(stages)).config
    options = {name: getattr(config, name) for name in names_with(config, "wiring")}
    ends = [stage.name_of(name) for stage in stages for name in stage.names() if name in stage.ends]
    return options | {"beta": beta_of(model), "ends": ends}


def same_wiring(wiring: Mapping[str, Any] | None, recorded: Mapping[str, Any]) -> bool:
    """Whether `wiring` is what was recorded. Records of earlier versions say nothing of `ends`."""
    return wiring is not None and all(wiring.get(name) == value for name, value in recorded.items())


def count_states(model: nn.Module) -> StateCount:
    """For states of the dtype of the parameters, outside of autocast."""
    counts = [state_count(stage) for stage in stages_of(model).values()]
    return StateCount(sum(count.kept for count in counts), sum(count.needed for count in counts))
