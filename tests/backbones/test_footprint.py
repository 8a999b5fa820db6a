"""The bytes counted on fake tensors are those that autograd and the engine save in a real forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from re2tal.backbones import BackboneConfig, build_backbone
from re2tal.planning.footprint import kept_bytes
from re2tal.reversible.recompute import saved_tensors_seen_by

FORMS: dict[str, dict[str, Any]] = {
    "plain": {"rewired": False},
    "rewired": {},
    "segments of one branch": {"segment": 1},
    "every state": {"beta": 0.0},
    "some states": {"beta": 0.2, "segment": 3},
    "offloaded": {"offload": True},
    "pairs of blocks": {"unit": "block", "merge": "extrapolate", "segment": 2},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "name", ["videomae_nano", "videoprism_nano", "timesformer_nano", "swin3d_nano", "slowfast_nano"]
)
def test_counted_bytes_are_saved_bytes(name: str, form: str) -> None:
    config = BackboneConfig(name=name, **FORMS[form])
    backbone = build_backbone(config)
    constant = {tensor.untyped_storage()._cdata for tensor in (*backbone.parameters(), *backbone.buffers())}
    saved: dict[int, Tensor] = {}

    def see(tensor: Tensor) -> None:
        if tensor.untyped_storage()._cdata not in constant:
            saved[tensor.untyped_storage()._cdata] = tensor

    with saved_tensors_seen_by(see):
        features = backbone(torch.randn(1, 3, 8, 32, 32), torch.ones(1, 8, dtype=torch.bool))
    wanted = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    assert features.values.requires_grad
    assert kept_bytes(build_backbone(config), num_frames=8, size=(32, 32)) == wanted
