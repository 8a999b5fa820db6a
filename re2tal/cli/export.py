"""`re2tal export`: write weights under the names that another code base gives them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from torch import Tensor

from re2tal.backbones.base import VideoBackbone
from re2tal.backbones.stored import NAME
from re2tal.config import RecognitionConfig, load_run
from re2tal.conversion import export_backbone, export_detector, import_backbone, save_for_the_library
from re2tal.training.export import write_tensors


def export(
    *,
    out: Path,
    to: Literal["opentad", "mmaction2", "torchvision", "pytorchvideo", "original", "transformers"],
    run: Path | None = None,
    weights: Path | None = None,
    backbone: str | None = None,
    prefix: str = "",
) -> None:
    """Write a trained detector, or a backbone, in the layout of another code base.

    A rewired network is written like the plain one; it computes what it did only where it is rewired again, as OpenTAD
    does.

    Args:
        out: .safetensors file to write; a folder for transformers
        to: whose names; OpenTAD's of a detector's run are all of it (a plain backbone's are then mmaction2's), all
            others its backbone alone
        run: run folder to take the weights from; of a recognizer's run the backbone alone is written
        weights: or a backbone's weights file; for a model of the transformers library a folder or hub name too
        backbone: its name, such as swin3d_tiny; needed with --weights
        prefix: put before every name, such as "module." for OpenTAD's loader or "backbone." for mmaction2's
    """
    if to == "transformers" and prefix:
        raise ValueError(f"--prefix {prefix} means nothing in a folder of the transformers library; leave it out")
    if to != "transformers" and out.suffix != ".safetensors":
        raise ValueError(f"--out {out} does not end in .safetensors, the one format that is written; rename it")
    if out.exists():
        raise ValueError(f"{out} is there already; give --out another name, or remove it")
    if run is not None and weights is None and backbone is None:
        from re2tal.cli.classify import load_recognizer
        from re2tal.cli.detect import load_detector

        config = load_run(run / "config.json")
        if isinstance(config, RecognitionConfig):
            recognizer = load_recognizer(run, config)
            _write_backbone(recognizer.backbone, out, name=config.backbone.name, to=to, prefix=prefix)
            return
        if config.backbone.name == NAME:
            raise ValueError(
                f"{run} was trained on stored features: it has a localizer and no backbone, and whole detectors and "
                "backbones are what is written; give a run on videos"
            )
        detector, name = load_detector(run, config), config.backbone.name
        if to == "opentad":
            _write(out, export_detector(detector, config=config.backbone, prefix=prefix), to)
        else:
            _write_backbone(detector.backbone, out, name=name, to=to, prefix=prefix)
    elif run is None and weights is not None and backbone is not None:
        network, _ = import_backbone(weights, name=backbone)
        _write_backbone(network, out, name=backbone, to=to, prefix=prefix)
    else:
        raise ValueError("give either --run FOLDER, or --weights FILE and --backbone NAME")


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
