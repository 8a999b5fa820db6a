"""Focal and DIoU losses against their definitions, written out in float64, and the running count."""

from __future__ import annotations

import math

import pytest
import torch

from re2tal.localizers.losses import RunningCount, diou_loss, sigmoid_focal_loss


def focal_by_definition(logit: float, target: float, alpha: float) -> float:
    p = 1 / (1 + math.exp(-logit))
    p_t = p * target + (1 - p) * (1 - target)
    cross_entropy = -target * math.log(p) - (1 - target) * math.log(1 - p)
    return (alpha * target + (1 - alpha) * (1 - target)) * (1 - p_t) ** 2 * cross_entropy


def diou_by_definition(first: tuple[float, float], second: tuple[float, float]) -> float:
    overlap = max(0.0, min(first[1], second[1]) - max(first[0], second[0]))
    union = (first[1] - first[0]) + (second[1] - second[0]) - overlap
    enclosing = max(first[1], second[1]) - min(first[0], second[0])
    distance = (first[0] + first[1]) / 2 - (second[0] + second[1]) / 2
    return 1 - overlap / union + (distance / enclosing) ** 2


@pytest.mark.parametrize("alpha", [0.25, 0.5])
def test_focal_loss_is_its_definition_for_hard_and_smoothed_targets(alpha: float) -> None:
    logits = torch.linspace(-6, 6, 13, dtype=torch.float64)
    for target in (0.0, 1.0, 0.9 + 0.1 / 3, 0.1 / 3):
        ours = sigmoid_focal_loss(logits, torch.full_like(logits, target), alpha=alpha)
        reference = [focal_by_definition(logit, target, alpha) for logit in logits.tolist()]
        torch.testing.assert_close(ours, torch.tensor(reference, dtype=torch.float64), rtol=1e-12, atol=0)


def test_diou_loss_is_its_definition_wherever_the_point_lies() -> None:
    offsets = torch.tensor([[1.0, 2.0], [0.5, 9.0], [3.0, 0.0], [4.0, 4.0]], dtype=torch.float64)
    targets = torch.tensor([[1.0, 2.0], [2.0, 1.0], [0.25, 0.5], [1.0, 7.0]], dtype=torch.float64)
    reference = [
        diou_by_definition((-left, right), (-true_left, true_right))
        for (left, right), (true_left, true_right) in zip(offsets.tolist(), targets.tolist(), strict=True)
    ]
    ours = diou_loss(offsets, targets)
    torch.testing.assert_close(ours, torch.tensor(reference, dtype=torch.float64), rtol=1e-12, atol=1e-15)
    assert ours[0] == 0


def test_gradients_are_those_of_finite_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(2, 12, generator=generator, dtype=torch.float64)
    offsets, true_offsets = 0.5 + 4 * torch.rand(2, 12, 2, generator=generator, dtype=torch.float64)
    logits.requires_grad_()
    offsets.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: sigmoid_focal_loss(x, targets.sigmoid()), (logits,))
    assert torch.autograd.gradcheck(lambda x: diou_loss(x, true_offsets), (offsets,))


def test_a_prediction_without_length_has_a_finite_loss_and_gradient() -> None:
    offsets = torch.zeros(1, 2, requires_grad=True)
    loss = diou_loss(offsets, torch.tensor([[1.0, 1.0]])).sum()
    loss.backward()
    assert loss.item() == 1.0
    assert offsets.grad is not None
    assert offsets.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_predictions_are_compared_in_float32(dtype: torch.dtype) -> None:
    offsets = torch.tensor([[1.0, 3.0]], dtype=dtype)
    assert diou_loss(offsets, torch.tensor([[1.0, 2.0]])).dtype == torch.float32
    assert sigmoid_focal_loss(offsets, torch.ones(1, 2)).dtype == torch.float32


def test_the_running_count_mixes_in_a_tenth_and_survives_a_cast_to_half_precision() -> None:
    count = RunningCount(100, momentum=0.9).bfloat16()
    assert count.update(torch.tensor(50)).item() == pytest.approx(95.0)
    for _ in range(200):
        count.update(torch.tensor(101))
    assert count.value().item() == pytest.approx(101, abs=1e-3)
    copy = RunningCount(7, momentum=0.9)
    copy.load_state_dict(count.state_dict())
    assert torch.equal(copy.value(), count.value())
