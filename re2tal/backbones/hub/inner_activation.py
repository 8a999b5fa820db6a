"""ResNet and RegNet of the transformers library, with activations inside of branches, as the paper rewires them.

    as released    activation(x + F(x))          only whole blocks can be rewired, RewiringConfig(unit="block")
    as rewired     x + activation(F(x))          so that what is added can be subtracted again

That is another network with the same weights, which must be fine-tuned. Only `move_activations_inside` makes it.
"""

from __future__ import annotations

from torch import Tensor, nn
from transformers.models.regnet.modeling_regnet import RegNetXLayer, RegNetYLayer
from transformers.models.resnet.modeling_resnet import ResNetBasicLayer, ResNetBottleNeckLayer

from re2tal.rewire import Branch, by_samples, residual_branches, why_not_residual


class InnerActivation(nn.Module):
    """A block of one of these networks, after its change."""

    layer: nn.Module
    shortcut: nn.Module
    activation: nn.Module

    def branch(self, x: Tensor) -> Tensor:
        """What is added to x."""
        return self.activation(self.layer(x))

    def forward(self, hidden_state: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H', W')."""
        return self.shortcut(hidden_state) + self.branch(hidden_state)


_KINDS = (ResNetBasicLayer, ResNetBottleNeckLayer, RegNetXLayer, RegNetYLayer)
_INNER: dict[type, type] = {kind: type(f"Inner{kind.__name__}", (InnerActivation, kind), {}) for kind in _KINDS}


def move_activations_inside(model: nn.Module) -> int:
    """Changes every block of `model` in place; returns how many. Parameters keep their names.

    Raises ValueError where there is none.
    """
    blocks = [module for module in model.modules() if type(module) in _INNER]
    if not blocks:
        known = ", ".join(kind.__name__ for kind in _KINDS)
        raise ValueError(f"this {type(model).__name__} has no block with an activation after its sum; known: {known}")
    for block in blocks:
        block.__class__ = _INNER[type(block)]
    return len(blocks)


@residual_branches.register
def _(block: InnerActivation) -> tuple[Branch, ...]:
    is_residual = isinstance(block.shortcut, nn.Identity)
    return (Branch("convolutions", InnerActivation.branch, cut=by_samples(inner_states=4)),) if is_residual else ()


@why_not_residual.register
def _(block: InnerActivation) -> str:
    return "it changes width or resolution (downsampling)"
