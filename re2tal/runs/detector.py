"""A trained detector as an object: open a run folder, show it video files, get actions in seconds."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from re2tal.config import RunConfig, load_config
from re2tal.detector import TemporalActionDetector
from re2tal.runs.detection import check_looks_at_videos, detect_in_shards, pack_videos
from re2tal.runs.folder import CONFIG_NAME
from re2tal.runs.trained import default_device
from re2tal.runs.trained import load_detector as load_network
from re2tal.training.engine import DTYPES


@dataclass(frozen=True, slots=True)
class FoundAction:
    """An action that a detector found in a video."""

    label: str
    """Name of its class."""
    start_seconds: float
    """When it begins, from the start of the video."""
    end_seconds: float
    """When it ends."""
    score: float
    """How sure the detector is, from 0 to 1."""


@dataclass(frozen=True, slots=True)
class Detector:
    """A trained detector on a device; `load_detector` makes it."""

    network: TemporalActionDetector
    """The network with its trained weights."""
    config: RunConfig
    """The run that trained it."""
    device: torch.device
    """Where the network lies."""
    batch_size: int
    """Clips in one forward."""

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of what it can find."""
        return tuple(self.network.localizer.classes)

    def detect(self, video_path: Path | str) -> list[FoundAction]:
        """Find the actions in a video file of any format and size, the surest first.

        Example:
            for action in re2tal.load_detector("runs/demo").detect("party.mp4"):
                print(f"{action.start_seconds:.1f} to {action.end_seconds:.1f} s: {action.label} ({action.score:.2f})")

        Raises:
            ValueError: the file cannot be used, with the reason.
        """
        path = Path(video_path)
        if not path.is_file():
            raise ValueError(f"{path} is not a file; give a video file")
        with tempfile.TemporaryDirectory(prefix="re2tal-detect-") as scratch:
            shards, _, rejected = pack_videos([path], Path(scratch), self.config.data.clips, classes=self.classes)
            if rejected:
                raise ValueError(f"{path} cannot be used: {rejected[0].reason}")
            found = detect_in_shards(
                self.network, shards, config=self.config, batch_size=self.batch_size, device=self.device
            )
        return [
            FoundAction(self.classes[label], start, end, score)
            for detections in found.values()
            for (start, end), score, label in zip(
                detections.segments.tolist(), detections.scores.tolist(), detections.labels.tolist(), strict=True
            )
        ]


def load_detector(
    folder: Path | str, *, device: torch.device | str | None = None, batch_size: int | None = None
) -> Detector:
    """Open the run folder of a trained detector.

    Args:
        folder: config.json and model.safetensors, as `train` or `re2tal import` wrote them
        device: "cpu", "cuda", "cuda:1", ...; by default an accelerator if there is one
        batch_size: clips in one forward; by default as in training

    Example:
        detector = re2tal.load_detector("runs/demo")
        actions = detector.detect("party.mp4")
    """
    run = Path(folder)
    config = load_config(run / CONFIG_NAME)
    check_looks_at_videos(run, config, asked="a detector for video files")
    chosen = torch.device(device) if device else default_device()
    network = load_network(run, config).to(chosen, DTYPES[config.engine.precision])
    return Detector(network, config, chosen, batch_size or config.engine.batch_size)
