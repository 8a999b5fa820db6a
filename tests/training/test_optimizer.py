"""Which parameter learns how fast, and which is pulled towards zero."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from re2tal.config import build_detector
from re2tal.recipes import find_recipe
from re2tal.training.optimizer import OptimizerConfig, build_optimizer, for_batch, parameter_groups

CONFIG = OptimizerConfig(learning_rate=1e-3, backbone_learning_rate=1e-5, weight_decay=0.05)


class ColumnNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, 4, 1))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Module()
        self.backbone.linear = nn.Linear(4, 4)
        self.backbone.norm = nn.LayerNorm(4)
        self.backbone.relative_position_bias_table = nn.Parameter(torch.zeros(9, 2))
        self.localizer = nn.Module()
        self.localizer.conv = nn.Conv1d(4, 1, 1)
        self.localizer.norm = ColumnNorm()
        self.localizer.scale = nn.Parameter(torch.ones(1))


def test_groups_by_part_and_decay():
    model = Model()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = {group["name"]: group for group in parameter_groups(model, CONFIG)}
    found = {name: sorted(names[id(one)] for one in group["params"]) for name, group in groups.items()}
    assert found == {
        "backbone, decayed": ["backbone.linear.weight"],
        "backbone, not decayed": [
            "backbone.linear.bias",
            "backbone.norm.bias",
            "backbone.norm.weight",
            "backbone.relative_position_bias_table",
        ],
        "localizer, decayed": ["localizer.conv.weight"],
        "localizer, not decayed": ["localizer.conv.bias", "localizer.norm.weight", "localizer.scale"],
    }
    rates = {name: (group["lr"], group["weight_decay"]) for name, group in groups.items()}
    assert rates == {
        "backbone, decayed": (1e-5, 0.05),
        "backbone, not decayed": (1e-5, 0.0),
        "localizer, decayed": (1e-3, 0.05),
        "localizer, not decayed": (1e-3, 0.0),
    }


def test_a_frozen_backbone_is_in_no_group():
    model = Model()
    model.backbone.requires_grad_(False)
    assert {group["name"] for group in parameter_groups(model, CONFIG)} == {
        "localizer, decayed",
        "localizer, not decayed",
    }


def test_nothing_of_the_demo_detector_is_lost():
    detector = build_detector(find_recipe("demo"), ["a", "b"])
    grouped = [id(one) for group in parameter_groups(detector, CONFIG) for one in group["params"]]
    assert sorted(grouped) == sorted(id(one) for one in detector.parameters() if one.requires_grad)
    not_decayed = {
        id(one) for group in parameter_groups(detector, CONFIG) if group["weight_decay"] == 0 for one in group["params"]
    }
    maps = {name for name, one in detector.named_parameters() if id(one) not in not_decayed}
    assert not [name for name in maps if name.endswith("bias") or "norm" in name or "scale" in name or "table" in name]


def test_nothing_to_train_is_an_error():
    with pytest.raises(ValueError, match="no parameter of the model requires a gradient"):
        parameter_groups(Model().requires_grad_(False), CONFIG)


def test_one_step_moves_each_part_at_its_own_rate():
    model = Model()
    before = {name: one.detach().clone() for name, one in model.named_parameters()}
    optimizer = build_optimizer(model, CONFIG)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    # Adam's first step is the learning rate itself in the direction of the gradient, after the decay.
    moved = before["localizer.scale"] - model.localizer.scale
    assert torch.allclose(moved, torch.tensor([1e-3]), rtol=1e-4)
    expected = before["backbone.linear.weight"] * (1 - 1e-5 * 0.05) - 1e-5
    assert torch.allclose(model.backbone.linear.weight, expected, rtol=0, atol=1e-9)


def test_adam_adds_its_weight_decay_to_the_gradient() -> None:
    layer = torch.nn.Linear(3, 2, bias=False)
    given = OptimizerConfig(algorithm="adam", learning_rate=0.1, weight_decay=0.5)
    optimizer = build_optimizer(layer, given)
    before = layer.weight.detach().clone()
    layer.weight.grad = torch.zeros_like(layer.weight)
    optimizer.step()
    # Adam's first step is the learning rate against the sign of the gradient, here of 0.5 * weight alone.
    torch.testing.assert_close(layer.weight.detach(), before - 0.1 * before.sign(), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"optimizer\.algorithm is 'sgd'; known: \['adamw', 'adam'\]"):
        OptimizerConfig(algorithm="sgd")


def test_learning_rates_follow_the_batch_only_when_asked() -> None:
    made = OptimizerConfig(learning_rate=1e-3, backbone_learning_rate=1e-5, made_for_clips=8)
    assert for_batch(made, clips=8) == (made, None)
    same, said = for_batch(made, clips=2)
    assert same == made
    assert said is not None
    assert "made for 8 clips per optimizer step, and here a step has 2; they stay as they are" in said
    scaled, said = for_batch(replace(made, follow_batch=True), clips=2)
    assert (scaled.learning_rate, scaled.backbone_learning_rate) == (2.5e-4, 2.5e-6)
    assert said is not None
    assert "multiplied by 0.25, to 0.00025" in said
    with pytest.raises(ValueError, match=r"optimizer\.follow_batch is set, but optimizer\.made_for_clips does not say"):
        OptimizerConfig(follow_batch=True)
