import math

import pytest
import torch

from re2tal.localizers.pyramid.actionformer import ActionFormerConfig, actionformer
from re2tal.localizers.pyramid.step_supervision import step_loss, step_targets
from re2tal.structures import Action, Features, Timeline


def test_a_step_is_taught_the_actions_that_cover_its_middle():
    segments = torch.tensor([[0.6, 2.5], [2.0, 3.4], [1.0, 2.0]])
    targets = step_targets(segments, torch.tensor([1, 0, 1]), num_steps=5, num_classes=3)
    assert targets.tolist() == [[0, 0, 1, 0, 0], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0]]


def test_a_clip_without_actions_teaches_zeros():
    targets = step_targets(torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64), num_steps=4, num_classes=2)
    assert targets.tolist() == [[0] * 4] * 2


def test_the_loss_is_cross_entropy_over_valid_steps_alone():
    logits = torch.tensor([[[0.0, 2.0, 9.0], [0.0, -1.0, 9.0]]])
    targets = torch.tensor([[[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]])
    by_hand = (2 * math.log(2) + math.log1p(math.exp(-2)) + math.log1p(math.exp(-1))) / 2
    assert step_loss(logits, targets, torch.tensor([[True, True, False]])).item() == pytest.approx(by_hand, rel=1e-6)
    assert step_loss(logits, targets, torch.zeros(1, 3, dtype=torch.bool)).item() == 0


def test_actionformer_adds_it_weighted_and_without_it_has_neither_loss_nor_parameters():
    features = Features(torch.randn(2, 6, 12), torch.ones(2, 12, dtype=torch.bool))
    actions = [[Action(1.0, 5.0, "b")], []]
    timelines = [Timeline(0.0, 0.5, 6.0)] * 2
    options = {"channels": 8, "num_heads": 2, "max_num_steps": 16, "regression_ranges": ((0, 4), (4, 100))}
    by_weight = {}
    for weight in (0.0, 1.0, 3.0):
        torch.manual_seed(0)
        config = ActionFormerConfig(step_supervision=weight, **options)
        localizer = actionformer(config, in_channels=6, classes=("a", "b")).eval()
        with torch.no_grad():
            by_weight[weight] = localizer.loss(localizer(features), actions, timelines)
        names = [name for name, _ in localizer.named_parameters() if name.startswith("step_classifier")]
        assert len(names) == (2 if weight else 0)
    assert "steps" not in by_weight[0.0]
    assert by_weight[3.0]["steps"].item() == pytest.approx(3 * by_weight[1.0]["steps"].item(), rel=1e-6)
    for losses in by_weight.values():
        parts = sum(value for name, value in losses.items() if name != "total")
        torch.testing.assert_close(losses["total"], parts)
