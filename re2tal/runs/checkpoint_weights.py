"""The network of a run that has not ended, from its newest sound checkpoint, whatever ZeRO stage and number of ranks.

Evaluation uses the moving average of the weights where there is one, so it is taken here too. Every file is checked
against the checkpoint's manifest, and read without executing anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from re2tal.backbones import take_parts_of
from re2tal.config import RunConfig, build_detector
from re2tal.data.contract.shards import FeatureSet, open_any, subset_folder
from re2tal.runs.folder import CHECKPOINTS_NAME
from re2tal.runs.stored_features import describe
from re2tal.training.export import ModelFile, facts_of
from re2tal.training.manifest import CheckpointManifest, newest_sound
from re2tal.training.saved_state import SavedState

TRIES = 3
"""A run that is still training removes old checkpoints, maybe the one that is being read."""


def read_newest_checkpoint(folder: Path, config: RunConfig) -> tuple[ModelFile, str]:
    """The trained network so far, and the name of the checkpoint; `config` as `started` gives it.

    Raises ValueError where no checkpoint is sound, or where the run is one whose network a checkpoint does not tell.
    """
    if config.annealing.epochs > 0:
        raise ValueError(
            f"{folder} has not ended, and its annealing.epochs is {config.annealing.epochs:g}: a checkpoint does not "
            "tell with which beta its network computes; wait for the end of training, or go on with re2tal train "
            "--resume"
        )
    for last in range(TRIES):
        checkpoint, manifest = _newest_sound(folder / CHECKPOINTS_NAME)
        try:
            classes, features = _classes(config, manifest)
            network = build_detector(config, classes)
            weights = _weights(checkpoint, manifest, averaged=config.training.average_decay is not None)
        # ValueError too: of a folder that is being removed, some files are left for a moment.
        except (FileNotFoundError, ValueError):
            if last == TRIES - 1 or checkpoint.is_dir():
                raise
        else:
            # Which norm a VideoMAE ends in is told by its weights, which this network was built without.
            take_parts_of(network.backbone, weights)
            names = set(network.state_dict())
            # Buffers that are not saved with a model are in the checkpoint all the same.
            weights = {name: value for name, value in weights.items() if name in names}
            model = ModelFile(checkpoint, weights, **facts_of(network, features=features))
            return model, checkpoint.name
    raise AssertionError


def _newest_sound(folder: Path) -> tuple[Path, CheckpointManifest]:
    name, manifest, faults = newest_sound(folder)
    if name is not None and manifest is not None:
        return folder / name, manifest
    if faults:
        said = "; ".join(f"{name}: {fault}" for name, fault in faults.items())
        raise ValueError(f"no checkpoint in {folder} is sound: {said}; train again")
    raise ValueError(
        f"{folder.parent} has no model.safetensors and no checkpoint yet; wait for the first one "
        "(training.checkpoint_every_steps), or for the end of training"
    )


def _classes(config: RunConfig, manifest: CheckpointManifest) -> tuple[tuple[str, ...], Mapping[str, Any] | None]:
    """Class names, which no checkpoint holds, from the shards it was trained on; and what features they are, if any."""
    root = subset_folder(config.data.shards, config.data.training_subset)
    try:
        shards = open_any(root)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"a checkpoint does not hold the names of its classes, and the shards of its training say them no more: "
            f"{error}; put {root} back, or go on to the end of training"
        ) from None
    if manifest.run.get("training shards") != shards.manifest_sha256:
        raise ValueError(
            f"{root} is not what this run was trained on: it has changed since, so the classes are not known; put it "
            "back as it was"
        )
    classes = ("action",) if config.localizer.class_agnostic else shards.classes
    return classes, describe(shards) if isinstance(shards, FeatureSet) else None


def _weights(checkpoint: Path, manifest: CheckpointManifest, *, averaged: bool) -> dict[str, Tensor]:
    """Float32 weights and buffers by name."""
    saved = SavedState(checkpoint, _read)
    if saved.is_sharded != (manifest.run["ZeRO stage"] > 0) or len(saved.ranks) != manifest.run["number of ranks"]:
        raise FileNotFoundError(f"{checkpoint} has lost some of its files")
    buffers = saved.ranks[0]["buffers"]
    # What stage 3 saves under the names of parameters is empty.
    weights = ({} if saved.cuts_parameters else saved.model["module"]) | buffers
    if not saved.is_sharded:
        names = [name for name in saved.model["module"] if name not in buffers]
        return _float(
            weights | _averages(checkpoint, saved.ranks[0]["average"], names, weights) if averaged else weights
        )
    shapes, wholes = saved.shapes, saved.whole("average" if averaged else "weights")
    assert wholes is not None
    if saved.cuts_parameters:
        shapes, wholes = shapes | saved.frozen_shapes, {**wholes, **saved.frozen(saved.frozen_shapes)}
    return _float(weights | {name: values.view(tuple(shapes[name])) for name, values in wholes.items()})


def _averages(
    checkpoint: Path, average: Sequence[Tensor], names: Sequence[str], weights: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Without ZeRO: the average of each trainable parameter, in the order of the network's parameters."""
    if [one.shape for one in average] != [weights[name].shape for name in names]:
        raise ValueError(
            f"{checkpoint}: its average does not fit its weights, some of which are frozen; wait for the "
            "end of training"
        )
    return dict(zip(names, average, strict=True))


def _float(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.float().contiguous() if value.is_floating_point() else value for name, value in weights.items()}


def _read(path: Path) -> Any:
    from re2tal.training.checkpoint_files import DurableCheckpointEngine  # imports DeepSpeed, which takes seconds

    return DurableCheckpointEngine().load(str(path), map_location="cpu")
