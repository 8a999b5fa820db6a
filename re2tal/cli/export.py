"""`re2tal export`: write weights under the names that another code base gives them."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from re2tal.files import output_file
from re2tal.runs.weights_export import export_run, export_weights


def export(
    *,
    out: Path,
    to: Literal["opentad", "mmaction2", "torchvision", "pytorchvideo", "original", "transformers", "re2tal"],
    run: Path | None = None,
    weights: Path | None = None,
    backbone: str | None = None,
    prefix: str = "",
) -> None:
    """Write a trained detector, or a backbone, in the layout of another code base.

    A rewired network is written like the plain one. It computes the same only where it is rewired again, as in OpenTAD.

    Args:
        out: .safetensors file to write; a folder for transformers and re2tal
        to: the code base whose names to use; opentad writes the whole detector of a run (a plain backbone as
            mmaction2 names it), re2tal a model folder, ready for the hub; all others write its backbone alone
        run: run folder to take the weights from; of a recognizer's run the backbone alone is written
        weights: or a backbone's weights file; for a model of the transformers library a folder or hub name too
        backbone: its name, such as swin3d_tiny; needed with --weights
        prefix: put before every name, such as "module." for OpenTAD's loader or "backbone." for mmaction2's
    """
    if out.suffix.lower() == ".safetensors":
        out = output_file(out, option="--out")
    if run is not None and weights is None and backbone is None:
        num_tensors = export_run(out, run=run, to=to, prefix=prefix)
    elif run is None and weights is not None and backbone is not None:
        num_tensors = export_weights(out, weights=weights, backbone=backbone, to=to, prefix=prefix)
    else:
        raise ValueError("give either --run FOLDER, or --weights FILE and --backbone NAME")
    usage = {
        "transformers": f"for from_pretrained of the transformers library, and --backbone.weights {out}",
        "re2tal": f"a model folder, for re2tal detect VIDEOS --model {out}",
    }
    print(f"{out}: {usage.get(to, f'{num_tensors} tensors as {to} names them')}")
