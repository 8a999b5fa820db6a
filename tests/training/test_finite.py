"""Weights that hold NaN or infinity are refused before training starts."""

from __future__ import annotations

import pytest
import torch
from training.tiny import TinyDetector

from re2tal.training.finite import check_finite


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite_are_refused_by_name(value) -> None:
    model = TinyDetector()
    check_finite(model)
    name, parameter = list(model.named_parameters())[1]
    with torch.no_grad():
        parameter.view(-1)[0] = value
    message = rf"1 of \d+ parameters hold NaN or infinity, such as {name} in 1 of {parameter.numel()} elements: the w"
    with pytest.raises(ValueError, match=message):
        check_finite(model)


def test_a_model_without_parameters_passes() -> None:
    check_finite(torch.nn.Identity())
