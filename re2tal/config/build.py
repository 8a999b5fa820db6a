"""From a configuration to the network that it describes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from re2tal.backbones import build_backbone, check_wiring
from re2tal.config.schema import RecognitionConfig, RunConfig, SharedConfig
from re2tal.detector import TemporalActionDetector
from re2tal.localizers import build_localizer
from re2tal.recognizer import Recognizer, load_classifier


def build_detector(config: RunConfig, classes: Sequence[str]) -> TemporalActionDetector:
    """The detector that `config` describes for actions of `classes`, its backbone with the weights the config names.

    Raises ValueError for weights of another wiring too.
    """
    check_wiring(config.backbone, first_beta=_first_beta(config))
    backbone = build_backbone(config.backbone)
    localizer = build_localizer(config.localizer, in_channels=backbone.out_channels, classes=classes)
    return TemporalActionDetector(backbone, localizer, num_steps=config.num_steps)


def build_recognizer(config: RecognitionConfig, classes: Sequence[str]) -> tuple[Recognizer, str]:
    """The recognizer that `config` describes, with the weights the config names, and a sentence on its classifier.

    Raises ValueError for weights of another wiring too.
    """
    check_wiring(config.backbone, first_beta=_first_beta(config))
    backbone = build_backbone(config.backbone)
    recognizer = Recognizer(backbone, config.recognizer, classes=classes)
    weights = config.backbone.weights
    if weights is None or not config.recognizer.pretrained_classifier:
        return recognizer, "the classifier starts anew"
    if not Path(weights).is_file():
        return recognizer, f"the classifier starts anew: only files are searched for one, not {weights}"
    return recognizer, load_classifier(recognizer, Path(weights))


def check_start_wiring(config: SharedConfig, file: Path) -> None:
    """Raises ValueError where the model in `file` was trained with another wiring than that of `config`."""
    # The run's own weights are not read: those of `file` come in their place.
    check_wiring(replace(config.backbone, weights=str(file)), first_beta=_first_beta(config))


def _first_beta(config: SharedConfig) -> float | None:
    return config.annealing.start if config.annealing.epochs > 0 else None
