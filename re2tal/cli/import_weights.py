"""`re2tal import`: make a run folder from a detector that OpenTAD trained, or a weights file from anyone's backbone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from re2tal.cli.say import say_detected, say_found
from re2tal.config import AnyRun
from re2tal.files import output_file
from re2tal.runs.detection import detect
from re2tal.runs.video_files import list_videos
from re2tal.runs.weights_import import import_into_file, import_into_run


def import_weights(
    weights: Annotated[Path, tyro.conf.Positional],
    *,
    run: Annotated[AnyRun, tyro.conf.arg(name="")],
    out: Path,
    classes: Path | None = None,
    as_plain: bool = False,
    videos: Path | None = None,
) -> int:
    """Convert weights that another code base trained; nothing that could run code is read.

    Args:
        weights: a .safetensors or torch file: a detector of OpenTAD (on features also of ActionFormer's release), or a
            backbone in any layout that its family reads
        run: the network, from --recipe NAME (thumos14_re2swin_tiny by default) or --config FILE, and its changes
        out: run folder for a whole detector, or a file ending in .safetensors for the backbone alone
        classes: text file with the detector's classes, one per line, in the order of its training
        as_plain: forget that a backbone was trained rewired, so that any wiring, or none, may start from its numbers
        videos: folder of video files in which to detect at once, as `re2tal detect FOLDER --model OUT` does
    """
    if out.suffix.lower() == ".safetensors":
        out = output_file(out, option="--out")
        _import_backbone(weights, run, out, as_plain=as_plain, videos=videos)
        return 0
    if as_plain:
        raise ValueError("--as-plain is for a backbone alone, --out FILE.safetensors; leave it out")
    if videos is not None:
        list_videos(videos)  # refuses a folder without any before anything is written
    done = import_into_run(weights, run, out, classes=classes)
    print(f"{done.report}\n{out}: for re2tal detect VIDEOS --model {out}")
    return 0 if videos is None else say_detected(detect(out, [videos], say=say_found))


def _import_backbone(weights: Path, run: AnyRun, out: Path, *, as_plain: bool, videos: Path | None) -> None:
    if videos is not None:
        raise ValueError(
            f"--videos {videos} needs a whole detector, and --out {out} is for its backbone; name a folder"
        )
    done = import_into_file(weights, run, out, as_plain=as_plain)
    print(done.report)
    if done.wiring is not None:
        print(f"trained rewired with {done.wiring}; {out} refuses another wiring (--as-plain forgets it)")
    print(f"{out}: for re2tal train --backbone.name {run.backbone.name} --backbone.weights {out}")
