"""`re2tal import`: make a run folder from a detector that OpenTAD trained, or a weights file from anyone's backbone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import tyro

from re2tal.backbones import BackboneConfig, trained_wiring
from re2tal.cli.detect import detect, list_videos
from re2tal.config import RecognitionConfig, RunConfig, save_config
from re2tal.conversion import import_backbone, import_detector
from re2tal.data.building.annotations import read_class_list
from re2tal.localizers.class_map import AGNOSTIC_CLASS
from re2tal.rewire import wiring_of
from re2tal.training.export import write_model, write_tensors


def import_weights(
    weights: Annotated[Path, tyro.conf.Positional],
    *,
    run: Annotated[RunConfig | RecognitionConfig, tyro.conf.arg(name="")],
    out: Path,
    classes: Path | None = None,
    as_plain: bool = False,
    videos: Path | None = None,
) -> int:
    """Convert weights that another code base trained; nothing that could run code is read.

    Args:
        weights: a .safetensors or torch file: an OpenTAD detector, or a backbone in any layout that its family reads
        run: the network, from --recipe NAME (thumos14_re2swin_tiny by default) or --config FILE, and its changes
        out: run folder for a whole detector, or a file ending in .safetensors for the backbone alone
        classes: text file with the detector's classes, one per line, in the order of its training
        as_plain: forget that a backbone was trained rewired, so that any wiring, or none, may start from its numbers
        videos: folder of video files in which to detect at once, as `re2tal detect --run OUT --videos FOLDER` does
    """
    if out.suffix == ".safetensors":
        if videos is not None:
            raise ValueError(
                f"--videos {videos} needs a whole detector, and --out {out} is for its backbone; name a folder"
            )
        if out.exists():
            raise ValueError(f"{out} is there already; give --out another name, or remove it")
        backbone, report = import_backbone(weights, name=run.backbone.name)
        out.parent.mkdir(parents=True, exist_ok=True)
        wiring = None if as_plain else trained_wiring(BackboneConfig(name=run.backbone.name, weights=str(weights)))
        header = {"backbone": run.backbone.name, "wiring": json.dumps(wiring)}
        write_tensors(out, backbone.state_dict(), metadata=header)
        print(report)
        if wiring is not None:
            print(f"trained rewired with {wiring}, which {out} says: another wiring is refused (--as-plain forgets it)")
        print(f"{out}: for re2tal train --backbone.name {run.backbone.name} --backbone.weights {out}")
        return 0
    if as_plain:
        raise ValueError("--as-plain is for a backbone alone, --out FILE.safetensors; leave it out")
    if not isinstance(run, RunConfig):
        raise ValueError(
            f"{run.name} is of a recognizer; give a detector's, or --out FILE.safetensors for its backbone"
        )
    if (out / "config.json").exists():
        raise ValueError(f"{out} is the folder of another run; give --out another one")
    if videos is not None:
        list_videos(videos)  # refuses a folder without any before anything is written
    config = replace(run, name=out.resolve().name, backbone=replace(run.backbone, weights=None))
    detector, report = import_detector(weights, config, classes=_classes(classes, config))
    out.mkdir(parents=True, exist_ok=True)
    names = detector.localizer.classes
    write_model(out / "model.safetensors", detector.state_dict(), classes=names, wiring=wiring_of(detector))
    # Last, because it is what makes the folder a run.
    save_config(out / "config.json", config)
    print(f"{report}\n{out}: for re2tal detect --run {out} --videos FOLDER")
    return 0 if videos is None else detect(run=out, videos=videos)


def _classes(path: Path | None, config: RunConfig) -> tuple[str, ...]:
    """The lines of the file that are not blank; one class that stands for all where the localizer tells none apart."""
    if config.localizer.class_agnostic:
        return (AGNOSTIC_CLASS,)
    if path is None:
        raise ValueError(
            "--classes is missing: a checkpoint does not name its classes; give a text file with one per line, in the "
            "order of training (OpenTAD keeps it as category_idx.txt beside the annotations)"
        )
    return read_class_list(path)
