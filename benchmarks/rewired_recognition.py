"""What rewiring does to a trained recognizer before any fine-tuning: the same weights in each rewired form.

    python benchmarks/rewired_recognition.py --run runs/plain [--json FILE]

The run is one of a plain backbone, such as `re2tal train --recipe demo_clips --backbone.no-rewired --out runs/plain`.
Prints, and writes to FILE, the accuracy on its validation clips of the network as it is, and rewired by unit and merge.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from re2tal.config import RecognitionConfig, build_recognizer, load_run
from re2tal.data.building.clips import true_classes
from re2tal.data.contract.shards import open_shards
from re2tal.data.streaming.stream import stream_clips
from re2tal.evaluation.accuracy import AccuracyReport, accuracy
from re2tal.inference import classify
from re2tal.runs.devices import default_device
from re2tal.strict_json import write_json
from re2tal.training.export import read_model

FORMS: dict[str, dict[str, Any]] = {
    "plain": {"rewired": False},
    "branches, mean (the paper's)": {},
    "branches, extrapolate": {"merge": "extrapolate"},
    "branches, extrapolate, segment 2": {"merge": "extrapolate", "segment": 2},
    "blocks, mean": {"unit": "block"},
}


def judge(run: Path, config: RecognitionConfig) -> AccuracyReport:
    """The accuracy of the run's weights in the network that `config` describes."""
    model = read_model(run / "model.safetensors")
    recognizer, _ = build_recognizer(config, model.classes)
    recognizer.load_state_dict(model.weights)
    shards = open_shards(config.data.shards / config.data.validation_subset)
    clips = stream_clips(shards, config.data.clips, batch_size=config.engine.batch_size, training=False)
    device = default_device()
    scores = classify(recognizer.to(device), clips.epoch(0), device=device)
    return accuracy(scores, true_classes(shards), classes=model.classes)


def main() -> None:
    """Judges every form, prints, writes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    config = load_run(arguments.run / "config.json")
    if not isinstance(config, RecognitionConfig) or config.backbone.rewired:
        raise SystemExit(f"{arguments.run} is not of a recognizer with a plain backbone; train one first")
    figures = {}
    for form, changes in FORMS.items():
        backbone = replace(config.backbone, **{"rewired": True, "weights": None, **changes})
        report = judge(arguments.run, replace(config, backbone=backbone))
        print(f"{form:34} {report}")
        figures[form] = report.to_json()
    if arguments.json:
        write_json(arguments.json, figures)


if __name__ == "__main__":
    main()
