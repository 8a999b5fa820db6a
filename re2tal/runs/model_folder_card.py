"""The model card: what a model was trained on, what it reaches and by which protocol, as the hub reads it.

The YAML head is what the hub's search and tables take; the text says the same to people.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

import re2tal
from re2tal.backbones.stored import NAME
from re2tal.config import AnyRun, RunConfig
from re2tal.data.streaming.windows import ResizeWhole, Slide, Trimmed

MARK = "library_name: re2tal"
"""In the head of each card that we write."""
TASK = "temporal-action-localization"
RECOGNITION = "video-classification"
SHARES = {"top1": "top-1", "top5": "top-5", "mean_class_accuracy": "mean class accuracy"}
"""The figures of a recognizer, as summary.json names them."""
MOST_CLASSES = 40


@dataclass(frozen=True, slots=True)
class Origin:
    """Where the weights come from, and what they reach."""

    source: str
    """A sentence: what they were trained on, or converted from."""
    dataset: str | None = None
    """Name of the data set, if it is known."""
    measured: Mapping[str, Any] | None = None
    """Content of summary.json, as training writes it; None where nothing was measured."""
    licence: str | None = None
    """As the hub names licences, such as apache-2.0."""
    notes: str = ""
    """Paragraphs to add, in Markdown."""


def model_card(config: AnyRun, classes: Sequence[str], origin: Origin) -> str:
    """README.md of a model folder."""
    if isinstance(config, RunConfig):
        kind, tags, use = "detector", [TASK, "video", config.backbone.name, config.localizer.name], _USE
    else:
        kind, tags, use = "recognizer", [RECOGNITION, "video", config.backbone.name], _USE_RECOGNIZER
    head = ModelCardData(
        library_name="re2tal", license=origin.licence, tags=tags, model_name=config.name, eval_results=_results(origin)
    )
    parts = [
        f"---\n{head.to_yaml().rstrip()}\n---",
        f"# {config.name}",
        f"A {kind} of {len(classes)} actions in video, for re2tal {re2tal.__version__}: {_network(config)}.",
        _classes(classes),
        f"## Input\n\n{_input(config)}",
        f"## Training\n\n{origin.source}",
        f"## Figures\n\n{_figures(config, origin)}",
        use,
        origin.notes,
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


_USE = """## Use

```python
import re2tal

detector = re2tal.load_detector("FOLDER")  # or its name on the hub
for action in detector.detect("party.mp4", min_score=0.3):
    print(action.start_seconds, action.end_seconds, action.label, action.score)
```"""


_USE_RECOGNIZER = """## Use

It says which of its actions a trimmed video shows: `re2tal classify --run FOLDER --videos VIDEOS`. A detector starts
from its backbone: `re2tal train --backbone.weights FOLDER/model.safetensors`."""


def _network(config: AnyRun) -> str:
    if not isinstance(config, RunConfig):
        return f"a {_wiring(config)} {config.backbone.name} and a classifier"
    if config.backbone.name == NAME:
        return f"{config.localizer.name} on stored features"
    return f"{config.localizer.name} on a {_wiring(config)} {config.backbone.name}"


def _wiring(config: AnyRun) -> str:
    return "rewired (reversible)" if config.backbone.rewired else "plain"


def _classes(classes: Sequence[str]) -> str:
    # A backtick would end the code that the name stands in, a line break the list.
    plain = ("".join(one if one.isprintable() and one != "`" else "?" for one in name) for name in classes)
    shown = ", ".join(f"`{name}`" for name in islice(plain, MOST_CLASSES))
    return f"Classes: {shown}{', ... (model.json has all)' if len(classes) > MOST_CLASSES else ''}."


def _input(config: AnyRun) -> str:
    clips = config.data.clips
    match clips.windowing:
        case Slide(num_frames=frames, frames_per_second=rate, frame_stride=stride):
            which = f", one of {stride} of each video's own rate" if stride > 1 else ""
            taken = f"windows of {frames} frames" + (
                f" at {rate:g} per second ({frames / rate:g} s)" if rate else which
            )
        case ResizeWhole(num_frames=frames):
            taken = f"each video as {frames} frames, whatever its length"
        case Trimmed(num_frames=frames, frames_per_second=rate, num_views=views, num_crops=crops):
            taken = f"clips of {frames} frames at {rate:g} per second, {views} by {crops} views of each video"
    if config.backbone.name == NAME:
        return f"Stored features: {taken.replace('frames', 'steps')}."
    how = "their middle square" if clips.fit == "crop" else "squeezed to a square"
    command = "detect" if isinstance(config, RunConfig) else "classify"
    return (
        f"RGB pictures, {taken}, {how} at {clips.size} x {clips.size} pixels. `re2tal {command}` does this with a "
        "video file of any format and size."
    )


def _results(origin: Origin) -> list[EvalResult] | None:
    # The hub's tables take no figure without a data set.
    if origin.measured is None or origin.dataset is None:
        return None
    measured = origin.measured
    if "average_map" not in measured:
        return [
            EvalResult(
                task_type=RECOGNITION,
                dataset_type=origin.dataset,
                dataset_name=origin.dataset,
                metric_type="accuracy",
                metric_name=name,
                metric_value=round(100 * measured[key], 2),
            )
            for key, name in SHARES.items()
        ]
    return [
        EvalResult(
            task_type=TASK,
            dataset_type=origin.dataset,
            dataset_name=origin.dataset,
            dataset_split=measured["subset"],
            metric_type="mAP",
            metric_name=f"average mAP, tIoU {', '.join(measured['map'])}, protocol {measured['protocol']}",
            metric_value=round(100 * measured["average_map"], 2),
        )
    ]


def _figures(config: AnyRun, origin: Origin) -> str:
    if (measured := origin.measured) is None:
        return "None was measured here. `re2tal evaluate` measures them."
    if "average_map" not in measured:
        shares = ", ".join(f"{name} {100 * measured[key]:.2f} %" for key, name in SHARES.items())
        return (
            f"Of the {measured['videos']} validation videos: {shares}; one training, seed {config.training.seed}."
            + _chosen(measured)
        )
    names = list(measured["map"])
    lines = [
        f"Mean average precision in percent on the {measured['videos']} videos of `{measured['subset']}`, by temporal "
        f"IoU, as protocol `{measured['protocol']}` counts (`re2tal evaluate --protocol {measured['protocol']}`); one "
        f"training, seed {config.training.seed}.",
        "",
        "| " + " | ".join([*names, "average"]) + " |",
        "| " + " | ".join(["---:"] * (len(names) + 1)) + " |",
        "| " + " | ".join(f"{100 * one:.2f}" for one in [*measured["map"].values(), measured["average_map"]]) + " |",
    ]
    if measured.get("class_agnostic"):
        lines.append("\nClass-agnostic: predictions and truths count as one class.")
    return "\n".join(lines) + _chosen(measured)


def _chosen(measured: Mapping[str, Any]) -> str:
    if not (chosen := measured.get("chosen")):
        return ""
    return f"\n\n{chosen['note'][0].upper()}{chosen['note'][1:]}."
