"""Weights under the names that another code base gives them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from re2tal.backbones.base import VideoBackbone
from re2tal.backbones.stored import NAME
from re2tal.config import RecognitionConfig, load_run
from re2tal.conversion import export_backbone, export_detector, import_backbone, save_for_the_library
from re2tal.runs.folder import CONFIG_NAME
from re2tal.runs.trained import load_detector, load_recognizer
from re2tal.training.export import write_tensors


def export_weights(out: Path, *, weights: Path, backbone: str, to: str, prefix: str = "") -> None:
    """Write a backbone of some weights file as `to` lays it out; the arguments are those of `re2tal export`."""
    _check(out, to=to, prefix=prefix)
    network, _ = import_backbone(weights, name=backbone)
    _write_backbone(network, out, name=backbone, to=to, prefix=prefix)


def export_run(out: Path, *, run: Path, to: str, prefix: str = "") -> None:
    """Write the detector of a run folder, or its backbone, as `to` lays it out; of a recognizer the backbone alone."""
    _check(out, to=to, prefix=prefix)
    config = load_run(run / CONFIG_NAME)
    name = config.backbone.name
    if isinstance(config, RecognitionConfig):
        _write_backbone(load_recognizer(run, config).backbone, out, name=name, to=to, prefix=prefix)
        return
    if name == NAME:
        raise ValueError(
            f"{run} was trained on stored features: it has a localizer and no backbone, and whole detectors and "
            "backbones are what is written; give a run on videos"
        )
    detector = load_detector(run, config)
    if to == "opentad":
        _write(out, export_detector(detector, config=config.backbone, prefix=prefix), to)
    else:
        _write_backbone(detector.backbone, out, name=name, to=to, prefix=prefix)


def _check(out: Path, *, to: str, prefix: str) -> None:
    if to == "transformers" and prefix:
        raise ValueError(f"--prefix {prefix} means nothing in a folder of the transformers library; leave it out")
    if to != "transformers" and out.suffix != ".safetensors":
        raise ValueError(f"--out {out} does not end in .safetensors, the one format that is written; rename it")
    if out.exists():
        raise ValueError(f"{out} is there already; give --out another name, or remove it")


def _write_backbone(backbone: VideoBackbone, out: Path, *, name: str, to: str, prefix: str) -> None:
    if to != "transformers":
        _write(out, export_backbone(backbone, name=name, to=to, prefix=prefix), to)
        return
    save_for_the_library(backbone, out, name=name)
    print(f"{out}: for from_pretrained of the transformers library, and --backbone.weights {out}")


def _write(out: Path, state: Mapping[str, Tensor], to: str) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(out, {key: value.contiguous() for key, value in state.items()}, metadata={"layout": to})
    print(f"{out}: {len(state)} tensors as {to} names them")
