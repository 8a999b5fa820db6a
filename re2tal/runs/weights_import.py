"""A run folder from a detector that OpenTAD trained, or a weights file from anyone's backbone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from re2tal.backbones import BackboneConfig, VideoBackbone, build_backbone, trained_wiring
from re2tal.backbones.hub.tiling import ClipwiseBackbone
from re2tal.config import AnyRun, RunConfig, save_config
from re2tal.conversion import ImportReport, import_backbone, import_detector
from re2tal.data.building.labels import read_class_list
from re2tal.localizers.class_map import AGNOSTIC_CLASS
from re2tal.runs.folder import CONFIG_NAME, MODEL_NAME
from re2tal.runs.model_folder import describe
from re2tal.runs.model_folder_card import Origin, model_card
from re2tal.training.export import clips_in_header, facts_of, write_model, write_tensors


@dataclass(frozen=True, slots=True)
class Imported:
    """Weights that were converted and written."""

    path: Path
    """The file or run folder."""
    report: ImportReport
    """Which names were read, and in which layout."""
    wiring: Mapping[str, Any] | None = None
    """Of a backbone's file: how the backbone was trained rewired. The file says so, and another wiring is refused."""


def import_into_file(weights: Path, config: AnyRun, out: Path, *, as_plain: bool = False) -> Imported:
    """Convert the backbone alone into one .safetensors file that `backbone.weights` takes."""
    if out.exists():
        raise ValueError(f"{out} is there already; choose another file, or remove it")
    backbone, report = import_backbone(weights, name=config.backbone.name)
    _refuse_other_clips(backbone, weights, name=config.backbone.name)
    out.parent.mkdir(parents=True, exist_ok=True)
    wiring = None if as_plain else trained_wiring(BackboneConfig(name=config.backbone.name, weights=str(weights)))
    header = {"backbone": config.backbone.name, "wiring": json.dumps(wiring)}
    header |= clips_in_header(backbone)
    write_tensors(out, backbone.state_dict(), metadata=header)
    return Imported(out, report, wiring)


def _refuse_other_clips(backbone: VideoBackbone, weights: Path, *, name: str) -> None:
    """Raises ValueError where clips have another length than the family's, which a file of tensors does not tell."""
    if not isinstance(backbone, ClipwiseBackbone):
        return
    with torch.device("meta"):
        usual: Any = build_backbone(BackboneConfig(name=name, rewired=False))
    if (frames := backbone.encoder.clip_frames) != usual.encoder.clip_frames:
        raise ValueError(
            f"{weights} takes clips of {frames} frames, and a file of a {name} is read as one of clips of "
            f"{usual.encoder.clip_frames}; give {weights} itself as backbone.weights"
        )


def import_into_run(weights: Path, config: AnyRun, out: Path, *, classes: Path | None = None) -> Imported:
    """Convert a whole detector into a run folder, as if it had been trained here."""
    if not isinstance(config, RunConfig):
        raise ValueError(
            f"{config.name} is of a recognizer; give a detector's, or name a .safetensors file for its backbone"
        )
    if (out / CONFIG_NAME).exists():
        raise ValueError(f"{out} is the folder of another run; choose another one")
    bare = replace(config.backbone, weights=None)
    config = replace(config, name=out.resolve().name, start_from=None, backbone=bare)
    detector, report = import_detector(weights, config, classes=_classes(classes, config))
    out.mkdir(parents=True, exist_ok=True)
    names = detector.localizer.classes
    write_model(out / MODEL_NAME, detector.state_dict(), **facts_of(detector, features=None))
    origin = Origin(f"Converted from `{weights.name}`, which was trained elsewhere. {report}")
    describe(out, config, names, card=model_card(config, names, origin))
    # Last, because it is what makes the folder a run.
    save_config(out / CONFIG_NAME, config)
    return Imported(out, report)


def _classes(path: Path | None, config: RunConfig) -> tuple[str, ...]:
    """The lines of the file that are not blank; one class that stands for all where the localizer tells none apart."""
    if config.localizer.class_agnostic:
        return (AGNOSTIC_CLASS,)
    if path is None:
        raise ValueError(
            "a checkpoint does not name its classes; give a text file (classes) with one per line, in the order "
            "of training (OpenTAD keeps it as category_idx.txt beside the annotations)"
        )
    return read_class_list(path)
