"""The convolution that reads its input as it lies gives what `nn.Conv1d` gives, whatever its options."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from re2tal.localizers.masked import Conv

OPTIONS: list[dict[str, Any]] = [
    {"kernel_size": 1},
    {"kernel_size": 1, "bias": False},
    {"kernel_size": 1, "padding": 1},
    {"kernel_size": 1, "stride": 2},
    {"kernel_size": 1, "groups": 2},
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 3, "padding": 2, "dilation": 2},
    {"kernel_size": 3, "padding": 1, "stride": 2, "groups": 4},
    {"kernel_size": 3, "padding": "same"},
    {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("steps_last", [True, False])
def test_every_option_means_what_it_means_to_torch(options: dict[str, Any], steps_last: bool) -> None:
    torch.manual_seed(0)
    theirs, ours = nn.Conv1d(4, 8, **options).double(), Conv(4, 8, **options).double()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 4, 9, dtype=torch.float64)
    x = x if steps_last else x.transpose(1, 2).contiguous().transpose(1, 2)
    found = []
    for conv in (theirs, ours):
        given = x.detach().requires_grad_()
        output = conv(given)
        output.square().sum().backward()
        found.append((output, given.grad, *(weight.grad for weight in conv.parameters())))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
