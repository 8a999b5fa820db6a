"""Activations of convolutional networks moved inside of branches, which only a call of the function does."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import RegNetConfig, RegNetModel, ResNetConfig, ResNetModel

from re2tal.backbones.hub.inner_activation import move_activations_inside
from re2tal.rewire import RewiringConfig, rewire

SIZES = {"depths": [2, 3, 2, 2], "hidden_sizes": [16, 32, 48, 64], "embedding_size": 16, "hidden_act": "relu"}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = {
        "bottleneck": lambda: ResNetModel(ResNetConfig(**SIZES)),
        "basic": lambda: ResNetModel(ResNetConfig(**SIZES, layer_type="basic")),
        "x": lambda: RegNetModel(RegNetConfig(**SIZES, groups_width=8, layer_type="x")),
        "y": lambda: RegNetModel(RegNetConfig(**SIZES, groups_width=8)),
    }[name]()
    return model.double().eval()


def pictures() -> torch.Tensor:
    return torch.randn(2, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["bottleneck", "basic", "x", "y"])
def test_the_paper_s_form_is_exact_and_has_autograd_s_gradients(name) -> None:
    model = build(name)
    before = model(pictures()).last_hidden_state
    names = list(model.state_dict())
    assert move_activations_inside(model) >= 9
    inner = model(pictures()).last_hidden_state
    assert not torch.allclose(before, inner)
    gradients = []
    for recompute in (True, False):
        rewired = copy.deepcopy(model)
        report = rewire(rewired, config=RewiringConfig(recompute=recompute), example=(pictures(),))
        assert list(rewired.state_dict()) == names
        assert "convolutions" in str(report)
        rewired(pictures()).last_hidden_state.square().mean().backward()
        gradients.append([parameter.grad for parameter in rewired.parameters() if parameter.grad is not None])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-9, atol=1e-12)
    rewired = copy.deepcopy(model)
    rewire(rewired, config=RewiringConfig(beta=0.0))
    torch.testing.assert_close(rewired(pictures()).last_hidden_state, inner, rtol=1e-12, atol=1e-12)


def test_as_released_it_is_refused_in_branches_with_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"'activation'; as a whole, RewiringConfig\(unit='block'\), it can be"):
        rewire(build("basic"), example=(pictures(),))


def test_other_models_have_nothing_to_move() -> None:
    with pytest.raises(ValueError, match="Linear has no block with an activation after its sum; known: ResNetBasicL"):
        move_activations_inside(nn.Linear(2, 2))
