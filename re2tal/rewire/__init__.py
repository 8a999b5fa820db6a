"""From a stock residual network to a rewired one: in place, no parameter added, removed or renamed."""

from re2tal.rewire.beta import beta_of, count_states, set_beta, wiring_of
from re2tal.rewire.branches import Branch, residual_branches, why_not_residual, wrap_output
from re2tal.rewire.cuts import Cut, Part, by_samples, by_tokens
from re2tal.rewire.nonresidual import Between, forgetful
from re2tal.rewire.recomputed_inputs import kept_as_sources
from re2tal.rewire.report import RewireReport
from re2tal.rewire.rewire import rewire, unrewire
from re2tal.rewire.stage import RewiredStage, RewiringConfig
from re2tal.rewire.worst_drift import worst_reading

__all__ = [
    "Between",
    "Branch",
    "Cut",
    "Part",
    "RewireReport",
    "RewiredStage",
    "RewiringConfig",
    "beta_of",
    "by_samples",
    "by_tokens",
    "count_states",
    "forgetful",
    "kept_as_sources",
    "residual_branches",
    "rewire",
    "set_beta",
    "unrewire",
    "why_not_residual",
    "wiring_of",
    "worst_reading",
    "wrap_output",
]
