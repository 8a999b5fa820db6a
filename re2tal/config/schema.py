"""RunConfig and RecognitionConfig: everything that makes a run, composed of the components' own configurations, and
their JSON form.

A run folder holds `config.json`, the configuration after recipe and overrides, which starts the same run again. A key
that no component knows is an error: a misspelt override must not train something else.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config

from re2tal.backbones import BackboneConfig, build_backbone, check_wiring
from re2tal.data.streaming.stream import ClipConfig
from re2tal.data.streaming.windows import ResizeWhole, Trimmed
from re2tal.detector import TemporalActionDetector
from re2tal.evaluation.protocols import EvaluationConfig
from re2tal.evaluation.suppression import SuppressionConfig
from re2tal.localizers import LocalizerConfig, build_localizer
from re2tal.localizers.pyramid.actionformer import ActionFormerConfig
from re2tal.recognizer import Recognizer, RecognizerConfig, load_classifier
from re2tal.strict_json import read_json, write_atomically
from re2tal.training.annealing import AnnealingConfig
from re2tal.training.engine import EngineConfig
from re2tal.training.optimizer import OptimizerConfig
from re2tal.training.schedule import ScheduleConfig
from re2tal.training.trainer import TrainingConfig


@dataclass(frozen=True)
class DataConfig:
    """Which shards to read, and how their videos become clips."""

    shards: Path = Path("shards")
    """Folder that `re2tal shards build` wrote, or `re2tal features`: one folder per subset in it. On features the
    backbone is left out."""
    training_subset: str = "training"
    """Folder in `shards` to train on."""
    validation_subset: str = "validation"
    """Folder in `shards` to evaluate on."""
    clips: ClipConfig = field(default_factory=ClipConfig)
    """From video to clip."""


@dataclass(frozen=True)
class Run:
    """What makes a run, whatever it trains."""

    name: str = "run"
    """Names the run folder, runs/NAME."""
    data: DataConfig = field(default_factory=DataConfig)
    """Shards and clips."""
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    """Frames to features."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Learning rates and weight decay."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """The course of the learning rates."""
    annealing: AnnealingConfig = field(default_factory=AnnealingConfig)
    """From the pretrained backbone to the rewired one."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """Batch, clipping and precision."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """Length of the run, averages, logs, checkpoints."""

    def __post_init__(self) -> None:
        if Path(self.name).name != self.name or self.name in {"", ".", ".."}:
            raise ValueError(f"name is {self.name!r}; it names a folder in runs/, so give one plain name")
        if self.annealing.epochs > 0 and not self.backbone.rewired:
            raise ValueError(
                f"annealing.epochs is {self.annealing.epochs}, but the backbone is not rewired; set backbone.rewired, "
                "or annealing.epochs to 0"
            )
        if not self.backbone.rewired:
            _refuse_settings_of_rewired(self.backbone)


def _refuse_settings_of_rewired(backbone: BackboneConfig) -> None:
    """ValueError for what a backbone that is not rewired would silently leave out."""
    for name in ("beta", "segment", "chunk_mebibytes", "known", "keep_nonresidual", "offload", "states"):
        value = getattr(backbone, name)
        if value != getattr(BackboneConfig(), name):
            raise ValueError(
                f"backbone.{name} is {value!r}, but the backbone is not rewired; set backbone.rewired, or leave "
                f"backbone.{name} out"
            )


@dataclass(frozen=True)
class RunConfig(Run):
    """One training run of a detector and its evaluation."""

    task: Literal["localization"] = "localization"
    """What the run trains: a network that says when something happens."""
    num_steps: int = 512
    """Length of the localizer's grid: a clip's features are resampled to so many steps."""
    localizer: LocalizerConfig = field(default_factory=ActionFormerConfig)
    """Features to actions."""
    suppression: SuppressionConfig = field(default_factory=SuppressionConfig)
    """From many detections to few."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
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
            case ActionFormerConfig(position_encoding=True, max_num_steps=limit) if self.num_steps > limit:
                raise ValueError(
                    f"num_steps is {self.num_steps}, but localizer.position_encoding is defined on "
                    f"localizer.max_num_steps = {limit}; raise the latter"
                )


@dataclass(frozen=True)
class RecognitionConfig(Run):
    """One training run of a recognizer and its evaluation: what a rewired backbone is fine-tuned by."""

    data: DataConfig = field(default_factory=lambda: DataConfig(clips=ClipConfig(windowing=Trimmed())))
    """Shards of trimmed clips, and views of them."""
    task: Literal["recognition"] = "recognition"
    """What the run trains: a network that says which of its classes a trimmed clip shows."""
    recognizer: RecognizerConfig = field(default_factory=RecognizerConfig)
    """Features to a class."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.data.clips.windowing, Trimmed | ResizeWhole):
            raise ValueError(
                f"data.clips.windowing is {type(self.data.clips.windowing).__name__}, which may cut an action off; "
                "recognition takes Trimmed or ResizeWhole"
            )


RUNS: dict[str, type[RunConfig] | type[RecognitionConfig]] = {
    "localization": RunConfig,
    "recognition": RecognitionConfig,
}
"""Task -> the kind of run that trains it."""


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


def _first_beta(config: Run) -> float | None:
    return config.annealing.start if config.annealing.epochs > 0 else None


def save_config(path: Path, config: Run) -> None:
    """Writes the JSON form of `config`, which `load_config` reads back as an equal one."""
    write_atomically(path, json.dumps(to_json(config), indent=2, allow_nan=False) + "\n")


def load_config(path: Path) -> RunConfig:
    """Reads the configuration of a detector's run. What it does not mention keeps its default.

    Raises FileNotFoundError, and ValueError that names the file, the key, its value and the nearest known key.
    """
    config = load_run(path)
    if not isinstance(config, RunConfig):
        raise ValueError(
            f"{path} is of a recognizer, which does not say when something happens (re2tal classify says what); give "
            f"the run of a detector (--backbone.weights {path.parent / 'model.safetensors'} starts one from it)"
        )
    return config


def load_run(path: Path) -> RunConfig | RecognitionConfig:
    """As `load_config`, of either kind of run; its `task` says which, and without one it is a detector's."""
    document = read_json(path)
    task = document.get("task", "localization") if isinstance(document, dict) else "localization"
    if task not in tuple(RUNS):
        raise ValueError(f"{path}: task is {task!r}; known: {sorted(RUNS)}")
    try:
        return _adapter(RUNS[task]).validate_python(document)
    except ValidationError as error:
        raise ValueError(f"{path}: {_explain(error, RUNS[task]())}") from None


def to_json(config: Run) -> dict[str, Any]:
    """`config` as JSON values."""
    return _adapter(type(config)).dump_python(config, mode="json")


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested JSON values -> ("data.clips.size", 224), ... in their order."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _adapter(run: type) -> TypeAdapter:
    for kind in _dataclasses_in(run):
        # Read by pydantic when it meets the class; on a class that already has it, this says the same again.
        with_config(ConfigDict(extra="forbid"))(kind)
    return TypeAdapter(run)


def _dataclasses_in(kind: Any) -> Iterator[type]:
    """`kind` and every dataclass among the types of its fields, unions included."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        for option in typing.get_args(kind):
            yield from _dataclasses_in(option)
    elif dataclasses.is_dataclass(kind) and isinstance(kind, type):
        yield kind
        for annotation in typing.get_type_hints(kind).values():
            yield from _dataclasses_in(annotation)


def _explain(error: ValidationError, default: Run) -> str:
    lines = []
    for fault in error.errors():
        key = ".".join(str(part) for part in fault["loc"]) or "the document"
        if fault["type"] == "unexpected_keyword_argument":
            known = [name for name, _ in flatten(to_json(default))]
            nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            lines.append(f"unknown key {key}" + (f"; did you mean {nearest[0]}?" if nearest else ""))
        elif fault["type"] == "value_error":  # raised by a component, which names key and value itself
            lines.append(fault["msg"].removeprefix("Value error, "))
        else:
            lines.append(f"{key} is {fault['input']!r}: {fault['msg']}")
    return "; ".join(lines)
