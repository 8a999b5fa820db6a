"""The start of a run from a trained model: `start_from` names a run folder, or its model.safetensors.

Every rank reads the file; the ranks' weights are compared before the first step.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from torch import nn

from re2tal.backbones.stored import NAME as STORED
from re2tal.config import (
    AnyRun,
    RecognitionConfig,
    RunConfig,
    build_detector,
    build_recognizer,
    check_start_wiring,
    load_run,
)
from re2tal.data.contract.shards import FeatureSet, ShardSet
from re2tal.distributed import is_main, together
from re2tal.runs.folder import CONFIG_NAME, MODEL_NAME, say_if_trained_on
from re2tal.runs.stored_features import check_features
from re2tal.runs.tasks import build_model
from re2tal.training.export import read_model
from re2tal.training.start import take_over

Either = TypeVar("Either", RunConfig, RecognitionConfig)


def find_start(config: AnyRun, shards: ShardSet | FeatureSet) -> Path | None:
    """The model file that the run starts from, if it names one, checked as far as can be without the network.

    FileNotFoundError, and ValueError for another backbone, another wiring, or other features.
    """
    source = config.start_from
    if source is None:
        return None
    if source.is_dir():
        _check_same_backbone(config, source)
        say_if_trained_on(source)
        source = source / MODEL_NAME
    model = read_model(source)
    check_start_wiring(config, source)
    if isinstance(shards, FeatureSet):
        check_features(shards, model.features, run=source)
    return source


def without_gone_files(config: AnyRun) -> AnyRun:
    """Every rank calls this: `config` without the files that a run started from and that are gone since, to build the
    network of one that is resumed: its checkpoint has their weights. A folder or hub name gives the network's size, and
    stays."""
    if config.backbone.name.startswith("videomae"):
        return config  # which norm the network ends in is told by its file alone
    start = config.start_from
    files = {"start_from": start / MODEL_NAME if start is not None and start.is_dir() else start}
    if config.backbone.weights is not None:
        from re2tal.backbones.hub.pretrained import weights_file  # imports transformers, which takes seconds

        files["backbone.weights"] = weights_file(config.backbone.weights)
    # On any rank: all have to build the same.
    lacking = together(lambda: [name for name, path in files.items() if path is not None and not path.exists()])
    gone = [name for name in files if any(name in names for names in lacking)]
    if "start_from" in gone:
        config = replace(config, start_from=None)
    if "backbone.weights" in gone:
        config = replace(config, backbone=replace(config.backbone, weights=None))
    for name in gone if is_main() else ():
        print(f"{name}, {files[name]}, is gone; the checkpoint has its weights", file=sys.stderr, flush=True)
    return config


def _check_same_backbone(config: AnyRun, folder: Path) -> None:
    if not (folder / CONFIG_NAME).is_file():
        return  # the tensors are compared all the same
    theirs, ours = load_run(folder / CONFIG_NAME).backbone.name, config.backbone.name
    if theirs != ours:
        raise ValueError(
            f"{folder} was trained with the backbone {theirs}, this run has {ours}; set backbone.name to {theirs}, or "
            "leave start_from out"
        )


def build_from(config: AnyRun, classes: tuple[str, ...], file: Path | None) -> nn.Module:
    """The network of `config` with what fits it of the model in `file`; rank 0 says what. Without, as `build_model`.

    ValueError where the backbone does not fit.
    """
    if file is None:
        return build_model(config, classes)
    start = read_model(file)
    if isinstance(config, RunConfig):
        detector = build_detector(_on(config, file), classes)
        rows = {f"localizer.{name}": layout for name, layout in detector.localizer.class_rows().items()}
        report = take_over(detector, start, classes=detector.classes, rows=rows)
        model: nn.Module = detector
    else:
        wanted = config.recognizer.pretrained_classifier
        # Its own way of finding a classifier takes all rows or none.
        bare = replace(config, recognizer=replace(config.recognizer, pretrained_classifier=False))
        recognizer, _ = build_recognizer(_on(bare, file), classes)
        rows = recognizer.class_rows()
        report = take_over(
            recognizer, start, classes=recognizer.classes, rows=rows, not_wanted=() if wanted else tuple(rows)
        )
        model = recognizer
    if is_main():
        print(report, file=sys.stderr, flush=True)
    return model


def _on(config: Either, file: Path) -> Either:
    """`config` with the backbone of `file`. A folder or hub name stays: it gives the network's size."""
    if config.backbone.name == STORED:
        return config
    from re2tal.backbones.hub.pretrained import weights_file  # imports transformers, which takes seconds

    weights = config.backbone.weights
    if weights is None or weights_file(weights) is not None:
        # A weights file of the backbone's own start would be read in vain, and may be gone; the start has its weights.
        weights = str(file)
    return replace(config, backbone=replace(config.backbone, weights=weights))
