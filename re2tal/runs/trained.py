"""The network of a run folder, with the weights that the run trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from re2tal.backbones import take_parts_of
from re2tal.config import RecognitionConfig, RunConfig, build_detector, build_recognizer, load_config
from re2tal.detector import TemporalActionDetector
from re2tal.extraction import tensors_sha256
from re2tal.recognizer import Recognizer
from re2tal.runs.checkpoint_weights import read_newest_checkpoint
from re2tal.runs.folder import CHECKPOINTS_NAME, CONFIG_NAME, MODEL_NAME, say_if_trained_on
from re2tal.runs.model_folder import check_facts, check_layout
from re2tal.training.export import ModelFile, read_model

R = TypeVar("R", RunConfig, RecognitionConfig)


@dataclass(frozen=True, slots=True)
class Trained:
    """A detector that was trained, read but not yet built."""

    folder: Path
    config: RunConfig
    model: ModelFile
    checkpoint: str | None = None
    """The checkpoint that the weights come from, where the run has not ended."""

    @property
    def classes(self) -> tuple[str, ...]:
        """What it can find."""
        return self.model.classes

    @property
    def features(self) -> Mapping[str, Any] | None:
        """The stored features of its training; None for videos."""
        return self.model.features

    @property
    def weights_id(self) -> str:
        """A text that differs where weights do."""
        return tensors_sha256(self.model.weights)[:16]

    def network(self) -> TemporalActionDetector:
        """The detector with its weights, on the CPU."""
        detector = build_detector(started(self.config), self.model.classes)
        take_parts_of(detector.backbone, self.model.weights)
        self.model.load_into(detector, classes=detector.localizer.classes)
        return detector


def open_detector(folder: Path) -> Trained:
    """The detector of a model folder or a run folder; of a run that has not ended, its newest sound checkpoint.

    Raises FileNotFoundError and ValueError where the folder holds neither.
    """
    if folder.is_file():
        raise ValueError(f"{folder} is a file; give the folder that holds it and {CONFIG_NAME}")
    check_layout(folder)
    config = load_config(folder / CONFIG_NAME)
    model_path = folder / MODEL_NAME
    if model_path.is_file() or not (folder / CHECKPOINTS_NAME).is_dir():
        model = read_model(model_path)
        check_facts(folder, config, model.classes)
        say_if_trained_on(folder)
        return Trained(folder, config, model)
    model, checkpoint = read_newest_checkpoint(folder, started(config))
    return Trained(folder, config, model, checkpoint)


def load_detector(run: Path, config: RunConfig) -> TemporalActionDetector:
    """The detector of a run folder with its trained weights, on the CPU."""
    say_if_trained_on(run)
    return Trained(run, config, read_model(run / MODEL_NAME)).network()


def load_recognizer(run: Path, config: RecognitionConfig) -> Recognizer:
    """The recognizer of a run folder with its trained weights, on the CPU."""
    check_layout(run)
    say_if_trained_on(run)
    model = read_model(run / MODEL_NAME)
    check_facts(run, config, model.classes)
    recognizer, _ = build_recognizer(started(config), model.classes)
    take_parts_of(recognizer.backbone, model.weights)
    model.load_into(recognizer, classes=recognizer.classes)
    return recognizer


def started(config: R) -> R:
    """The configuration without the weights file that the backbone started from, to build the trained network.

    The file may not be on this machine, and is not needed. A folder or hub name stays: it gives the network's size.
    """
    weights = config.backbone.weights
    if weights is not None:
        from re2tal.backbones.hub.pretrained import weights_file  # imports transformers, which takes seconds

        weights = None if weights_file(weights) else weights
    return replace(config, backbone=replace(config.backbone, weights=weights))
