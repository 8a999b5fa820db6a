"""Comparisons that the backbone parity tests share, with the tolerances as an argument."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from parity.vectors import Case
from torch import Tensor


@dataclass(frozen=True)
class Tolerances:
    """By precision: relative to the largest reference value, except `loss` and `norm`, relative to the value itself."""

    output: dict[torch.dtype, float]
    grad_x: dict[torch.dtype, float]
    loss: dict[torch.dtype, float]
    norm: dict[torch.dtype, float]
    norm_floor: dict[torch.dtype, float]
    """A norm may also be off by this much of the largest norm."""
    probe: dict[torch.dtype, float]


def suffix(dtype: torch.dtype) -> str:
    return {torch.float32: "", torch.float64: "_f64"}[dtype]


def check_values(case: Case, values: Mapping[str, Tensor], tolerances: Tolerances, *, dtype: torch.dtype) -> None:
    """Every reference array of this precision whose name says that it is an output must be in `values`, and agree."""
    kinds = ("raw_", "out_", "streams_")
    keys = [key for key in case.arrays if key.startswith(kinds) and key.endswith("_f64") == (dtype == torch.float64)]
    assert any(key.startswith("out_") for key in keys)
    for key in keys:
        value, reference = values[key.removesuffix("_f64")], case.arrays[key].astype(np.float64)
        assert value.dtype == dtype
        assert tuple(value.shape) == reference.shape, key
        off = largest_error(value, reference)
        assert off <= tolerances.output[dtype], f"{key}: off by {off:.2e} of the largest value"


def largest_error(value: Tensor, reference: np.ndarray) -> float:
    """Relative to the largest reference value."""
    return float(np.abs(value.detach().double().numpy() - reference).max() / np.abs(reference).max())


def check_loss(case: Case, loss: Tensor, tolerances: Tolerances) -> None:
    reference = float(case.arrays["loss" + suffix(loss.dtype)])
    assert loss.item() == pytest.approx(reference, rel=tolerances.loss[loss.dtype], abs=0)


def check_gradients(case: Case, x: Tensor, gradients: Sequence[Tensor | None], tolerances: Tolerances) -> None:
    """`gradients` in the order of `param_names`; a reference of NaN means that no gradient reaches that parameter."""
    dtype = x.dtype
    if dtype in tolerances.grad_x:
        off = largest_error(x.grad, case.arrays["grad_x"].astype(np.float64))
        assert off <= tolerances.grad_x[dtype], f"grad_x: off by {off:.2e} of the largest value"
    norms = case.arrays["param_grad_norm" + suffix(dtype)]
    probes = case.arrays["param_grad_probe" + suffix(dtype)]
    largest = np.nanmax(norms)
    names = case.arrays["param_names"].tolist()
    for name, norm, probe, gradient in zip(names, norms, probes, gradients, strict=True):
        assert (gradient is None) == bool(np.isnan(norm)), name
        if gradient is None:
            continue
        flat = gradient.detach().double().flatten()
        waves = torch.cos(0.37 * torch.arange(flat.numel(), dtype=torch.float64) + 0.1)
        allowed = max(tolerances.norm[dtype] * norm, tolerances.norm_floor[dtype] * largest)
        assert abs(float(flat.norm()) - norm) <= allowed, f"{name}: norm {float(flat.norm())}, not {norm}"
        off = abs(float(flat @ waves) - probe) / largest
        assert off <= tolerances.probe[dtype], f"{name}: probe off by {off:.2e} of the largest norm"
