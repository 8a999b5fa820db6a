"""Model files: what comes back, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from training.tiny import RewiredTinyDetector, TinyDetector

from re2tal.rewire import RewiredStage, set_beta, wiring_of
from re2tal.training.export import read_model, write_model

WIRING = {"unit": "branch", "merge": "mean", "segment": None, "beta": 0.75}


def test_weights_and_classes_come_back(tmp_path):
    source, target = TinyDetector(), TinyDetector()
    write_model(tmp_path / "model.safetensors", source.state_dict(), classes=["jump", "run"])
    model = read_model(tmp_path / "model.safetensors")
    assert model.classes == ("jump", "run")
    model.load_into(target, classes=["jump", "run"])
    for name, value in source.state_dict().items():
        assert torch.equal(target.state_dict()[name], value)


def test_equal_models_are_equal_files_that_the_library_reads(tmp_path):
    state = TinyDetector().state_dict()
    for number in range(8):  # the library's own order changes from call to call
        write_model(tmp_path / f"{number}.safetensors", state, classes=["jump \u00fc"], wiring=WIRING)
    assert len({(tmp_path / f"{number}.safetensors").read_bytes() for number in range(8)}) == 1
    with safe_open(tmp_path / "0.safetensors", framework="pt") as file:
        assert file.metadata()["classes"] == json.dumps(["jump \u00fc"])
    for name, value in load_file(tmp_path / "0.safetensors").items():
        assert torch.equal(state[name], value)


def test_another_class_list_is_refused(tmp_path):
    write_model(tmp_path / "model.safetensors", TinyDetector().state_dict(), classes=["jump", "run"])
    message = r"model.safetensors was trained for 2 classes \(jump, run\), the detector is for 4 \(a, b, c, ...\)"
    with pytest.raises(ValueError, match=message):
        read_model(tmp_path / "model.safetensors").load_into(TinyDetector(), classes=["a", "b", "c", "d"])


def test_another_network_is_refused(tmp_path):
    state = TinyDetector().state_dict()
    state["localizer.weight"] = torch.zeros(2, 24)
    write_model(tmp_path / "model.safetensors", state, classes=["a"])
    expected = r"1 tensors differ, such as localizer.weight: \(2, 24\) in the file, \(1, 24\)"
    with pytest.raises(ValueError, match=expected):
        read_model(tmp_path / "model.safetensors").load_into(TinyDetector(), classes=["a"])


def test_a_network_of_another_coupling_is_refused(tmp_path):
    write_model(tmp_path / "model.safetensors", RewiredTinyDetector().state_dict(), classes=["a"], wiring=WIRING)
    model, detector = read_model(tmp_path / "model.safetensors"), RewiredTinyDetector()
    assert model.wiring == WIRING
    with pytest.raises(ValueError, match=r"was trained rewired with .*0\.75.*, the detector is built with .*1\.0"):
        model.load_into(detector, classes=["a"])
    set_beta(detector, 0.75)
    model.load_into(detector, classes=["a"])
    write_model(tmp_path / "new.safetensors", model.weights, classes=["a"], wiring=wiring_of(detector))
    read_model(tmp_path / "new.safetensors").load_into(detector, classes=["a"])
    next(one for one in detector.modules() if isinstance(one, RewiredStage)).ends = frozenset("0")
    with pytest.raises(ValueError, match=r"was trained rewired with .*'ends': \[\].*, the detector is built with"):
        read_model(tmp_path / "new.safetensors").load_into(detector, classes=["a"])


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    with pytest.raises(FileNotFoundError, match=r"train first, or name the model\.safetensors of a run folder"):
        read_model(path)
    path.write_bytes(b"no such thing")
    with pytest.raises(ValueError, match=r"model.safetensors is not a safetensors file"):
        read_model(path)
    save_file({"weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="not a trained re2tal model"):
        read_model(path)
