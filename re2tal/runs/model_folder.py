"""A model is one folder, which needs nothing else to find actions in videos.

FOLDER/model.safetensors   weights, class names, wiring
       config.json         the network, and how it was trained
       model.json          what goes in and what comes out: version of this layout, classes, preprocessing
       README.md           the model card: what it was trained on, what it reaches and by which protocol

Training, import and export write it, `Detector.save_pretrained` too. A run folder is one, with more files in it. What
model.json says twice, `check_facts` compares: a file that was edited or mixed up is an error, not another result.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

import re2tal
from re2tal.backbones.stored import NAME
from re2tal.config import AnyRun, RunConfig, save_config, to_json
from re2tal.data.contract.shards import FeatureSet, ShardSet
from re2tal.data.streaming.transforms import MEAN, STD
from re2tal.files import write_atomically
from re2tal.runs.folder import CHECKPOINTS_NAME, CONFIG_NAME, FACTS_NAME, METRICS_NAME, MODEL_NAME
from re2tal.runs.model_folder_card import MARK, Origin, model_card
from re2tal.strict_json import read_json
from re2tal.training.export import write_model

CARD_NAME = "README.md"
FILES = (MODEL_NAME, CONFIG_NAME, FACTS_NAME, CARD_NAME)
"""The whole model."""
SHIPPED = Path(__file__).resolve().parents[1] / "models" / "everyday_actions_nano"
"""The small model that comes with the package, as package data."""
SHARDS = "shards"
"""What config.json of a model says of the shards of its training, which are elsewhere."""
WINDOWING = ("num_frames", "frames_per_second", "overlap", "num_views", "num_crops")
"""How windows are cut where nothing is trained."""
LAYOUT = 1
"""Rises with each change after which older versions would misread the folder."""


def facts(config: AnyRun, classes: Sequence[str]) -> dict[str, Any]:
    """The content of model.json."""
    clips = to_json(config)["data"]["clips"]
    # Only what matters to a user of the model: how windows were drawn in training does not.
    windowing = {name: clips["windowing"][name] for name in WINDOWING if name in clips["windowing"]}
    # Left out at 1, so that files of before this option still agree.
    if (stride := clips["windowing"].get("frame_stride", 1)) > 1:
        windowing["frame_stride"] = stride
    taken = {"windowing": type(config.data.clips.windowing).__name__, **windowing}
    pictures = {"size": clips["size"], "fit": clips["fit"], "rgb_mean": list(MEAN), "rgb_std": list(STD)}
    input_facts = {"frames": taken} | ({} if config.backbone.name == NAME else {"pictures": pictures})
    return {"layout": LAYOUT, "re2tal": re2tal.__version__, "classes": list(classes), "preprocessing": input_facts}


def describe(folder: Path, config: AnyRun, classes: Sequence[str], *, card: str) -> None:
    """Write model.json and the card beside weights and configuration; a README.md of another kind stays as it is."""
    write_atomically(folder / FACTS_NAME, json.dumps(facts(config, classes), indent=2) + "\n")
    if not (folder / CARD_NAME).exists() or is_card(folder / CARD_NAME):
        write_atomically(folder / CARD_NAME, card)


def read_card(folder: Path) -> str | None:
    """The model card of a folder; None where it has none."""
    path = folder / CARD_NAME
    return path.read_text(encoding="utf-8") if is_card(path) else None


def is_card(path: Path) -> bool:
    """Whether a file is a model card that we wrote."""
    # In the front matter alone: a README may quote a card further down.
    return path.is_file() and MARK in path.read_text(encoding="utf-8", errors="replace").partition("\n---")[0]


def check_layout(folder: Path) -> None:
    """ValueError where model.json is of another version, before anything else of the folder is read."""
    if not (folder / FACTS_NAME).is_file():
        return
    document = read_json(folder / FACTS_NAME)
    layout = document.get("layout") if isinstance(document, dict) else None
    if layout != LAYOUT:
        said = document.get("re2tal", "an unknown version") if isinstance(document, dict) else "an unknown version"
        raise ValueError(
            f"{folder / FACTS_NAME} has layout {layout!r}, written by re2tal {said}; this is re2tal "
            f"{re2tal.__version__}, which reads layout {LAYOUT}: install the version that wrote it, or fetch the model "
            "anew"
        )


def check_facts(folder: Path, config: AnyRun, classes: Sequence[str]) -> None:
    """ValueError where model.json says something else than weights and configuration."""
    if not (folder / FACTS_NAME).is_file():
        return
    document, expected = read_json(folder / FACTS_NAME), facts(config, classes)
    for name, other in (("classes", MODEL_NAME), ("preprocessing", CONFIG_NAME)):
        # Through JSON, which turns tuples into lists, as in the file.
        if not _agrees(document.get(name), json.loads(json.dumps(expected[name]))):
            raise ValueError(
                f"{folder / FACTS_NAME} and {other} do not agree on the {name}: one of them was changed, or comes from "
                f"another model; fetch the folder anew, or, if {other} is right, remove {FACTS_NAME}"
            )


def _agrees(said: Any, expected: Any) -> bool:
    """Whether all that this version says is said, too: others may say more."""
    if isinstance(said, dict) and isinstance(expected, dict):
        return all(name in said and _agrees(said[name], value) for name, value in expected.items())
    return bool(said == expected)


def save_model(
    folder: Path,
    config: RunConfig,
    weights: Mapping[str, Tensor],
    *,
    classes: Sequence[str],
    wiring: Mapping[str, Any] | None,
    features: Mapping[str, Any] | None = None,
    clip_frames: int | None = None,
    card: str,
) -> None:
    """Write a model folder that names no place of this machine. ValueError for the folder of a training run."""
    if (folder / METRICS_NAME).exists() or (folder / CHECKPOINTS_NAME).exists():
        raise ValueError(f"{folder} is the folder of a training run, which holds its model already; name another one")
    # Somebody's own README is not overwritten; nor would the model be without its card.
    if (folder / CARD_NAME).exists() and not is_card(folder / CARD_NAME):
        raise ValueError(f"{folder / CARD_NAME} is there already, and is no model card; name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    write_model(
        folder / MODEL_NAME, weights, classes=classes, wiring=wiring, features=features, clip_frames=clip_frames
    )
    save_config(folder / CONFIG_NAME, config)
    document = read_json(folder / CONFIG_NAME)
    # save_config made the path absolute, which names this machine.
    document["data"]["shards"] = SHARDS
    write_atomically(folder / CONFIG_NAME, json.dumps(document, indent=2, allow_nan=False) + "\n")
    describe(folder, config, classes, card=card)


def describe_trained(
    folder: Path, config: AnyRun, classes: Sequence[str], *, summary: Mapping[str, Any], training: ShardSet | FeatureSet
) -> None:
    """Write model.json and the card of a run that has ended; `summary` is the content of summary.json."""
    kind = "features of " if isinstance(training, FeatureSet) else ""
    dataset = training.manifest.dataset
    source = (
        f"Trained on the {kind}{len(training.videos)} videos of subset `{config.data.training_subset}` of data set "
        f"`{dataset}` for {summary['steps']} steps ({config.training.epochs:g} epochs) with {summary['ranks']} "
        f"ranks, in {summary['train_seconds']:.0f} s; {_began(config)}. config.json has all settings."
    )
    describe(folder, config, classes, card=model_card(config, classes, Origin(source, dataset, summary)))


def _began(config: AnyRun) -> str:
    if config.start_from is not None:
        # Not the whole path, which names places of this machine.
        return f"it began with the model `{'/'.join(config.start_from.parts[-2:])}`"
    if config.backbone.name == NAME:
        return "it began with random weights"
    weights = config.backbone.weights
    return f"the backbone began with {f'weights `{Path(weights).name}`' if weights else 'random weights'}"
