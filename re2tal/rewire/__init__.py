"""From a stock residual network to a rewired one: in place, no parameter added, removed or renamed."""

import sys
from types import ModuleType

from torch import Tensor, nn

from re2tal.rewire import torch_layers  # noqa: F401  (registers them)
from re2tal.rewire.beta import beta_of, count_states, same_wiring, set_beta, wiring_of
from re2tal.rewire.branches import Branch, residual_branches, stream_axis, why_not_residual, wrap_output
from re2tal.rewire.config import RewiringConfig
from re2tal.rewire.cuts import Cut, Part, by_samples, by_tokens
from re2tal.rewire.discover import Example
from re2tal.rewire.nonresidual import CheckpointedModule, checkpointed
from re2tal.rewire.pending import RewireError
from re2tal.rewire.recomputed_inputs import recompute_conv_inputs
from re2tal.rewire.report import RewireReport
from re2tal.rewire.rewire import rewire, unrewire
from re2tal.rewire.same_network import check_same_network
from re2tal.rewire.stage import RewiredStage, stages_of
from re2tal.rewire.worst_drift import largest_drift

__all__ = [
    "Branch",
    "CheckpointedModule",
    "Cut",
    "Part",
    "RewireError",
    "RewireReport",
    "RewiredStage",
    "RewiringConfig",
    "beta_of",
    "by_samples",
    "by_tokens",
    "check_same_network",
    "checkpointed",
    "count_states",
    "largest_drift",
    "recompute_conv_inputs",
    "residual_branches",
    "rewire",
    "same_wiring",
    "set_beta",
    "stages_of",
    "stream_axis",
    "unrewire",
    "why_not_residual",
    "wiring_of",
    "wrap_output",
]


class _CallablePackage(ModuleType):
    """This package, which is called like the function of its name.

    `re2tal.rewire` names both, and importing a module of this package puts the package itself there: so that
    `re2tal.rewire(model)` means the same before and after, the package can be called.
    """

    def __call__(
        self, model: nn.Module, *, config: RewiringConfig | None = None, example: Tensor | Example | None = None
    ) -> RewireReport:
        """As `re2tal.rewire.rewire`.

        Example:
            model = VideoMAEModel.from_pretrained("MCG-NJU/videomae-base")
            print(re2tal.rewire(model))  # what was rewired, what was left alone and why
        """
        from re2tal.rewire.rewire import rewire

        return rewire(model, config=config, example=example)


sys.modules[__name__].__class__ = _CallablePackage
