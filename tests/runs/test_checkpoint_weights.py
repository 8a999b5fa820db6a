"""The network of a run that has not ended: what is known of it beside its weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from re2tal.backbones import BackboneConfig
from re2tal.config import RunConfig, build_detector
from re2tal.recipes import find_recipe
from re2tal.runs import checkpoint_weights
from re2tal.training.export import read_model, write_model

CLASSES = ("jump", "run")


@pytest.mark.parametrize("features", [None, {"backbone": "swin3d_nano"}])
def test_its_facts_are_those_that_its_end_would_write(features, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    demo = find_recipe("demo")
    assert isinstance(demo, RunConfig)
    config = replace(demo, backbone=BackboneConfig(name="internvideo2_nano", beta=0.75))
    saved = {name: torch.full_like(value, 0.5) for name, value in build_detector(config, CLASSES).state_dict().items()}
    step = tmp_path / "checkpoints" / "step-00000004"
    monkeypatch.setattr(checkpoint_weights, "_newest_sound", lambda folder: (step, None))
    monkeypatch.setattr(checkpoint_weights, "_classes", lambda config, manifest: (CLASSES, features))
    monkeypatch.setattr(
        checkpoint_weights, "_weights", lambda *_, **__: {**saved, "a_buffer_that_no_model_has": torch.zeros(1)}
    )
    model, name = checkpoint_weights.read_newest_checkpoint(tmp_path, config)
    assert (name, model.classes, model.features) == (step.name, CLASSES, features)
    assert model.clip_frames == 4  # of InternVideo2's nano
    assert model.wiring is not None
    assert model.wiring["beta"] == 0.75
    assert set(model.weights) == set(saved)

    # A file of it fits the network, and no other.
    write_model(tmp_path / "model.safetensors", model.weights, **model.facts)
    written = read_model(tmp_path / "model.safetensors")
    written.load_into(network := build_detector(config, CLASSES), classes=CLASSES)
    assert all(torch.equal(value, saved[name]) for name, value in network.state_dict().items())
    other = build_detector(replace(config, backbone=replace(config.backbone, beta=1.0)), CLASSES)
    with pytest.raises(ValueError, match="was trained rewired with"):
        written.load_into(other, classes=CLASSES)
