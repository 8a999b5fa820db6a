"""Weights under the names that another code base gives them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from re2tal.backbones import trained_wiring
from re2tal.backbones.base import BackboneConfig, VideoBackbone
from re2tal.backbones.slowfast import network as slowfast
from re2tal.backbones.stored import NAME
from re2tal.config import RecognitionConfig, load_run
from re2tal.conversion import export_backbone, export_detector, import_backbone, save_for_the_library
from re2tal.rewire import wiring_of
from re2tal.runs.folder import CONFIG_NAME
from re2tal.runs.model_folder import read_card, save_model
from re2tal.runs.model_folder_card import Origin, model_card
from re2tal.runs.trained import load_detector, load_recognizer, open_detector, started
from re2tal.training.export import clips_in_header, write_tensors

MODEL_FOLDER = "re2tal"
"""The layout of a model folder of our own."""


def export_weights(out: Path, *, weights: Path, backbone: str, to: str, prefix: str = "") -> int:
    """Write a backbone of some weights file in the layout `to`; returns the number of tensors.

    The arguments are those of `re2tal export`.
    """
    if to == MODEL_FOLDER:
        raise ValueError(f"{weights} is a backbone, and a model folder holds a whole detector; give its run (run)")
    _refuse_wrong_target(out, to=to, prefix=prefix)
    network, _ = import_backbone(weights, name=backbone)
    wiring = trained_wiring(BackboneConfig(name=backbone, weights=str(weights)))
    return _write_backbone(network, out, name=backbone, to=to, prefix=prefix, wiring=wiring)


def export_run(out: Path, *, run: Path, to: str, prefix: str = "") -> int:
    """Write the detector of a run folder, or its backbone, in the layout `to`; of a recognizer the backbone alone.

    Returns the number of tensors.
    """
    if to == MODEL_FOLDER:
        return _export_model(out, run, prefix=prefix)
    _refuse_wrong_target(out, to=to, prefix=prefix)
    config = load_run(run / CONFIG_NAME)
    name = config.backbone.name
    if isinstance(config, RecognitionConfig):
        recognizer = load_recognizer(run, config)
        _merge(recognizer.backbone, config.backbone)
        wiring = _wiring(recognizer.backbone, name)
        return _write_backbone(recognizer.backbone, out, name=name, to=to, prefix=prefix, wiring=wiring)
    if name == NAME:
        raise ValueError(
            f"{run} was trained on stored features, so it has no backbone; only whole detectors and backbones can be "
            "exported: give a run on videos"
        )
    detector = load_detector(run, config)
    _merge(detector.backbone, config.backbone)
    wiring = _wiring(detector.backbone, name)
    if to == "opentad":
        state = export_detector(detector, config=config.backbone, prefix=prefix)
        return _write(out, state, to, wiring, detector.backbone)
    return _write_backbone(detector.backbone, out, name=name, to=to, prefix=prefix, wiring=wiring)


def _wiring(backbone: VideoBackbone, name: str) -> dict[str, Any] | None:
    """How the exported network is rewired: its names do not tell, and a plain one computes something else with them.

    None at beta 0, which is the plain network, but for branches of SlowFast.
    """
    wiring = wiring_of(backbone)
    if wiring is None or (wiring["beta"] == 0 and not (name in slowfast.SIZES and wiring["unit"] == "branch")):
        return None
    return wiring


def _export_model(out: Path, run: Path, *, prefix: str) -> int:
    """The model of a run without the course of its training."""
    if prefix:
        raise ValueError(f"the prefix {prefix!r} means nothing in a model folder; leave it out")
    trained = open_detector(run)
    if out.exists():
        raise ValueError(f"{out} is there already; choose another name, or remove it")
    model, config = trained.model, started(trained.config)
    card = read_card(run) or model_card(config, model.classes, Origin(f"Exported from a run called {config.name}."))
    save_model(out, config, model.weights, **model.facts, card=card)
    return len(model.weights)


def _merge(backbone: VideoBackbone, config: BackboneConfig) -> None:
    """Low-rank updates become part of the weights: other code bases have no place for them."""
    if config.adapter == "lora":
        from re2tal.backbones.adapters.lora import merge_lora

        merge_lora(backbone)


def _refuse_wrong_target(out: Path, *, to: str, prefix: str) -> None:
    if to == "transformers" and prefix:
        raise ValueError(f"the prefix {prefix!r} means nothing in a folder of the transformers library; leave it out")
    if to != "transformers" and out.suffix.lower() != ".safetensors":
        raise ValueError(f"{out} does not end in .safetensors, the only format of weights files here; rename it")
    if out.exists():
        raise ValueError(f"{out} is there already; choose another name, or remove it")


def _write_backbone(
    backbone: VideoBackbone, out: Path, *, name: str, to: str, prefix: str, wiring: dict[str, Any] | None
) -> int:
    if to != "transformers":
        return _write(out, export_backbone(backbone, name=name, to=to, prefix=prefix), to, wiring, backbone)
    save_for_the_library(backbone, out, name=name, wiring=wiring)
    return len(backbone.state_dict())


def _write(
    out: Path, state: Mapping[str, Tensor], to: str, wiring: dict[str, Any] | None, backbone: VideoBackbone
) -> int:
    out.parent.mkdir(parents=True, exist_ok=True)
    header = {"layout": to, "wiring": json.dumps(wiring)} | clips_in_header(backbone)
    write_tensors(out, {key: value.contiguous() for key, value in state.items()}, metadata=header)
    return len(state)
