"""The network of a run folder, with the weights that the run trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch

from re2tal.config import RecognitionConfig, RunConfig, build_detector, build_recognizer
from re2tal.detector import TemporalActionDetector
from re2tal.recognizer import Recognizer
from re2tal.runs.folder import MODEL_NAME
from re2tal.training.export import read_model

AnyRun = TypeVar("AnyRun", RunConfig, RecognitionConfig)


def load_detector(run: Path, config: RunConfig) -> TemporalActionDetector:
    """The detector of a run folder with its trained weights, on the CPU."""
    model = read_model(run / MODEL_NAME)
    detector = build_detector(started(config), model.classes)
    model.load_into(detector, classes=detector.localizer.classes)
    return detector


def load_recognizer(run: Path, config: RecognitionConfig) -> Recognizer:
    """The recognizer of a run folder with its trained weights, on the CPU."""
    model = read_model(run / MODEL_NAME)
    recognizer, _ = build_recognizer(started(config), model.classes)
    model.load_into(recognizer, classes=recognizer.classes)
    return recognizer


def started(config: AnyRun) -> AnyRun:
    """The configuration without the weights file that the backbone started from, to build the trained network.

    The file may not be on this machine, and is not needed. A folder or hub name stays: it gives the network's size.
    """
    weights = config.backbone.weights
    if weights is not None:
        from re2tal.backbones.hub.pretrained import weights_file  # imports transformers, which takes seconds

        weights = None if weights_file(weights) else weights
    return replace(config, backbone=replace(config.backbone, weights=weights))


def default_device() -> torch.device:
    """The accelerator, if there is one."""
    return (torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None) or torch.device(
        "cpu"
    )
