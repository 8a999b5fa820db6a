"""Weights of a plain network in a rewired one are said to mean little there, unless the coupling starts near it."""

from __future__ import annotations

from typing import Any

import pytest
from safetensors.torch import save_file

from re2tal.backbones import BackboneConfig, build_backbone, plain_start


@pytest.fixture
def weights(tmp_path) -> str:
    save_file(
        build_backbone(BackboneConfig(name="swin3d_nano", rewired=False)).state_dict(), tmp_path / "plain.safetensors"
    )
    return str(tmp_path / "plain.safetensors")


def test_three_ways_out_are_named(weights: str) -> None:
    warning = plain_start(BackboneConfig(name="swin3d_nano", weights=weights))
    assert warning is not None
    assert warning.startswith(f"{weights} holds weights of a plain network")
    for way in (
        "annealing.epochs above 0",
        "backbone.merge extrapolate, backbone.segment 2",
        "kinetics400_re2swin_tiny",
    ):
        assert way in warning
    lora = plain_start(BackboneConfig(name="swin3d_nano", weights=weights, adapter="lora"))
    assert lora is not None
    assert "Its trunk is frozen" in lora


def test_what_the_hub_says_of_a_name_counts(monkeypatch) -> None:
    config, said = BackboneConfig(name="videomae_base", weights="MCG-NJU/videomae-base"), {"model_type": "videomae"}
    monkeypatch.setattr("re2tal.backbones.hub.pretrained.read_config", lambda weights: said)
    assert plain_start(config) is not None
    said["re2tal_wiring"] = {"unit": "branch", "merge": "mean", "segment": None, "beta": 1.0, "ends": []}
    assert plain_start(config) is None


@pytest.mark.parametrize(
    "fields", [{"rewired": False}, {"beta": 0.0}, {"merge": "extrapolate", "segment": 2}, {"weights": None}]
)
def test_nothing_is_said_of_what_starts_near_it(weights: str, fields: dict[str, Any]) -> None:
    config = BackboneConfig(**({"name": "swin3d_nano", "weights": weights} | fields))
    assert plain_start(config) is None


def test_annealing_from_0_is_a_way_out(weights: str) -> None:
    config = BackboneConfig(name="swin3d_nano", weights=weights)
    assert plain_start(config, first_beta=0.0) is None
    assert plain_start(config, first_beta=0.5) is not None


def test_weights_that_were_trained_rewired_are_at_home(tmp_path) -> None:
    state = build_backbone(BackboneConfig(name="swin3d_nano", rewired=False)).state_dict()
    wiring = '{"unit": "branch", "merge": "mean", "segment": null, "beta": 1.0, "ends": []}'
    save_file(state, tmp_path / "rewired.safetensors", metadata={"wiring": wiring})
    assert plain_start(BackboneConfig(name="swin3d_nano", weights=str(tmp_path / "rewired.safetensors"))) is None
