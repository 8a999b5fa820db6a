"""The settings under which a rewired network of every family is the one before it, and the way from there.

SlowFast's residual blocks end with a ReLU of the sum, which no coupling of branches has: its branches take it inside,
and make another network of it. With whole blocks as units it is like all others.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from re2tal.backbones import BACKBONES, BackboneConfig, build_backbone
from re2tal.backbones.base import VideoBackbone
from re2tal.backbones.hub.tiling import ClipwiseBackbone
from re2tal.backbones.swin3d.network import SwinBlock
from re2tal.rewire import set_beta

FAMILIES = sorted({build: name for name, build in reversed(BACKBONES.items())}.values())
every_family = pytest.mark.parametrize("name", FAMILIES)


def build(name: str, **fields: Any) -> VideoBackbone:
    """With random parameters: several are zero or one by default, which would hide mistakes."""
    torch.manual_seed(0)
    backbone = build_backbone(BackboneConfig(name=name, **fields))
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return backbone.eval()


def features(backbone: VideoBackbone, *, dtype: torch.dtype = torch.float32) -> Tensor:
    shape = (2, 3, 8, 32, 32) if isinstance(backbone, ClipwiseBackbone) else (2, 3, 8, 37, 33)
    frames = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=dtype)
    return backbone(frames, torch.ones(2, 8, dtype=torch.bool)).values


def unit_of(name: str) -> str:
    return "block" if name.startswith("slowfast") else "branch"


def relative_difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


@every_family
@torch.no_grad()
def test_pairs_of_branches_extrapolated_are_the_network_before_rewiring(name: str) -> None:
    """Wherever blocks begin and end: the two of a pair may belong to different ones, as TimeSformer's three do."""
    plain = features(build(name, rewired=False))
    faithful = features(build(name, unit=unit_of(name), merge="extrapolate", segment=2))
    assert relative_difference(faithful, plain) < 1e-6
    assert relative_difference(features(build(name, unit=unit_of(name))), plain) > 1e-3


@every_family
@pytest.mark.parametrize("merge", ["mean", "extrapolate"])
@torch.no_grad()
def test_beta_0_is_the_network_before_rewiring(name: str, merge: str) -> None:
    plain = features(build(name, rewired=False))
    for unit in {"block", unit_of(name)}:
        start = features(build(name, unit=unit, merge=merge, beta=0.0))
        assert relative_difference(start, plain) < 1e-6


@torch.no_grad()
def test_beta_0_shows_a_registered_branch_that_is_the_whole_block(monkeypatch) -> None:
    """x + F(x) registered in the place of F(x): the shapes fit, and nothing else would tell."""
    plain = features(build("swin3d_nano", rewired=False))
    mlp_branch = SwinBlock.mlp_branch
    monkeypatch.setattr(SwinBlock, "mlp_branch", lambda block, x: x + mlp_branch(block, x))
    assert relative_difference(features(build("swin3d_nano", beta=0.0)), plain) > 1e-3


@every_family
@torch.no_grad()
def test_beta_leads_from_there_to_the_coupling_of_the_paper_in_small_steps(name: str) -> None:
    backbone = build(name, unit=unit_of(name), beta=0.0)
    found = []
    for index in range(5):
        set_beta(backbone, index / 4)
        found.append(features(backbone))
    assert torch.equal(found[-1], features(build(name, unit=unit_of(name))))
    gaps = [relative_difference(values, found[0]) for values in found]
    assert gaps == sorted(gaps)
    assert max(later - earlier for earlier, later in pairwise(gaps)) < 0.7 * gaps[-1]


@torch.no_grad()
def test_branches_of_slowfast_are_another_network() -> None:
    plain = features(build("slowfast_nano", rewired=False))
    assert relative_difference(features(build("slowfast_nano", beta=0.0)), plain) > 1e-3


@every_family
@pytest.mark.parametrize("beta", [0.0, 0.3, 0.95])
def test_on_the_way_gradients_are_those_of_plain_autograd(name: str, beta: float) -> None:
    found = []
    for recompute in (True, False):
        backbone = build(name, beta=beta, recompute=recompute).double()
        values = features(backbone, dtype=torch.float64)
        (values * torch.linspace(-1, 1, values.numel(), dtype=torch.float64).view_as(values)).sum().backward()
        found.append([values.detach(), *(parameter.grad for parameter in backbone.parameters())])
    # Some gradients, of key biases, are zero but for rounding: errors count against the largest gradient.
    largest = max(float(gradient.abs().max()) for gradient in found[1][1:])
    for rebuilt, kept in zip(*found, strict=True):
        torch.testing.assert_close(rebuilt, kept, rtol=1e-9, atol=1e-11 * largest)
