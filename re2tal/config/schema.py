"""RunConfig and RecognitionConfig: everything that makes a run, composed of the components' own configurations, and
their JSON form.

A run folder holds `config.json`, the configuration after recipe and overrides, which starts the same run again. A key
that no component knows is an error: a misspelt override must not train something else.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from re2tal.backbones import BackboneConfig
from re2tal.data.streaming.decode import DecoderName
from re2tal.data.streaming.stream import ClipConfig
from re2tal.data.streaming.windows import ResizeWhole, Trimmed
from re2tal.evaluation.protocols import EvaluationConfig
from re2tal.evaluation.suppression import SuppressionConfig
from re2tal.localizers import LocalizerConfig
from re2tal.localizers.pyramid.actionformer import ActionFormerConfig
from re2tal.localizers.pyramid.config import PaddedPyramidConfig
from re2tal.options import names_with, option
from re2tal.recognizer import RecognizerConfig
from re2tal.rewire.config import SAVING
from re2tal.training.annealing import AnnealingConfig
from re2tal.training.config import EngineConfig, TrainingConfig
from re2tal.training.optimizer import OptimizerConfig
from re2tal.training.schedule import ScheduleConfig


@dataclass(frozen=True)
class DataConfig:
    """Which shards to read, and how their videos become clips."""

    shards: Path = option(Path("shards"), resumable=True)
    """Folder that `re2tal shards build` wrote, or `re2tal features`: one folder per subset in it. On features the
    backbone is left out."""
    training_subset: str = "training"
    """Folder in `shards` to train on."""
    validation_subset: str = option("validation", resumable=True)
    """Folder in `shards` to evaluate on."""
    decoder: DecoderName = option("decord", resumable=True, planned=False)
    """What decodes videos: decord, pyav or torchcodec. They give the same pictures; torchcodec is the fastest, and has
    to be installed."""
    clips: ClipConfig = option(default_factory=ClipConfig, planned=True)
    """From video to clip."""


@dataclass(frozen=True)
class SharedConfig:
    """What makes a run, whatever it trains."""

    name: str = option("run", resumable=True)
    """Names the run folder, runs/NAME."""
    start_from: Path | None = None
    """A run folder, or its model.safetensors, with the same backbone: weights that fit are taken, classes of the same
    name keep theirs, and what is new is said. None starts from backbone.weights."""
    data: DataConfig = field(default_factory=DataConfig)
    """Shards and clips."""
    backbone: BackboneConfig = option(default_factory=BackboneConfig, planned=True)
    """Frames to features."""
    optimizer: OptimizerConfig = option(default_factory=OptimizerConfig, planned=True)
    """Learning rates and weight decay."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """The course of the learning rates."""
    annealing: AnnealingConfig = field(default_factory=AnnealingConfig)
    """From the pretrained backbone to the rewired one."""
    engine: EngineConfig = option(default_factory=EngineConfig, planned=True)
    """Batch, clipping and precision."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """Length of the run, averages, logs, checkpoints."""

    def __post_init__(self) -> None:
        # A name with a slash would write outside of runs/.
        if Path(self.name).name != self.name or self.name in {"", ".", ".."}:
            raise ValueError(f"name is {self.name!r}; it names a folder in runs/, so give one plain name")
        if self.backbone.trained_clips < 1 and not isinstance(self.data.clips.windowing, ResizeWhole):
            raise ValueError(
                f"backbone.trained_clips is {self.backbone.trained_clips}, but data.clips.windowing is "
                f"{type(self.data.clips.windowing).__name__}, which draws other clips in every epoch, so none would be "
                "found in the memory; set it to ResizeWhole, or trained_clips to 1"
            )
        if self.annealing.epochs > 0 and not self.backbone.rewired:
            raise ValueError(
                f"annealing.epochs is {self.annealing.epochs}, but the backbone is not rewired; set backbone.rewired, "
                "or annealing.epochs to 0"
            )
        if not self.backbone.rewired:
            of_rewired = names_with(self.backbone, "of_rewired")
            _refuse_settings(self.backbone, of_rewired, "the backbone is not rewired; set backbone.rewired")
        elif not self.backbone.recompute:
            _refuse_settings(self.backbone, SAVING, "backbone.recompute is off, which saves all activations; set it")


def _refuse_settings(backbone: BackboneConfig, names: Iterable[str], reason: str) -> None:
    """ValueError for what the backbone would silently leave out."""
    for name in names:
        value = getattr(backbone, name)
        if value != getattr(BackboneConfig(), name):
            raise ValueError(f"backbone.{name} is {value!r}, but {reason}, or leave backbone.{name} out")


R = TypeVar("R", bound=SharedConfig)


def without_settings(run: R, names: Collection[str]) -> tuple[R, dict[str, Any]]:
    """`run` with these fields of its backbone at their defaults, and the values that this replaces, by field."""
    default = {name: getattr(BackboneConfig(), name) for name in names}
    left_out = {name: value for name in names if (value := getattr(run.backbone, name)) != default[name]}
    return replace(run, backbone=replace(run.backbone, **default)), left_out


@dataclass(frozen=True)
class RunConfig(SharedConfig):
    """One training run of a detector and its evaluation."""

    task: Literal["localization"] = option("localization", planned=True)
    """What the run trains: a network that says when something happens."""
    num_steps: int = option(512, planned=True)
    """Length of the localizer's grid: a clip's features are resampled to so many steps."""
    localizer: LocalizerConfig = option(default_factory=ActionFormerConfig, planned=True)
    """Features to actions."""
    suppression: SuppressionConfig = option(default_factory=SuppressionConfig, resumable=True)
    """From many detections to few."""
    evaluation: EvaluationConfig = option(default_factory=EvaluationConfig, resumable=True)
    """How detections are scored."""

    def __post_init__(self) -> None:
        super().__post_init__()
        windowing = self.data.clips.windowing
        if isinstance(windowing, Trimmed):
            raise ValueError(
                "data.clips.windowing is Trimmed, whose clips say what happens but not when; give Slide or ResizeWhole"
            )
        if not 1 <= self.num_steps <= windowing.num_frames:
            raise ValueError(
                f"num_steps is {self.num_steps} and data.clips.windowing.num_frames {windowing.num_frames}; the grid "
                "has at least one step, and no more than there are frames"
            )
        match self.localizer:
            case PaddedPyramidConfig(position_encoding=True, max_num_steps=limit) if self.num_steps > limit:
                raise ValueError(
                    f"num_steps is {self.num_steps}, but localizer.position_encoding is defined on "
                    f"localizer.max_num_steps = {limit}; raise the latter"
                )


@dataclass(frozen=True)
class RecognitionConfig(SharedConfig):
    """One training run of a recognizer and its evaluation: what a rewired backbone is fine-tuned by."""

    data: DataConfig = field(default_factory=lambda: DataConfig(clips=ClipConfig(windowing=Trimmed())))
    """Shards of trimmed clips, and views of them."""
    task: Literal["recognition"] = option("recognition", planned=True)
    """What the run trains: a network that says which of its classes a trimmed clip shows."""
    recognizer: RecognizerConfig = option(default_factory=RecognizerConfig, planned=True)
    """Features to a class."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.data.clips.windowing, Trimmed | ResizeWhole):
            raise ValueError(
                f"data.clips.windowing is {type(self.data.clips.windowing).__name__}, which may cut an action off; "
                "recognition takes Trimmed or ResizeWhole"
            )


AnyRun = RunConfig | RecognitionConfig

RUNS: dict[str, type[RunConfig] | type[RecognitionConfig]] = {
    "localization": RunConfig,
    "recognition": RecognitionConfig,
}
"""Task -> the kind of run that trains it."""
