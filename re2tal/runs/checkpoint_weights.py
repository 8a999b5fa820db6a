"""The network of a run that has not ended, from its newest sound checkpoint, whatever ZeRO stage and number of ranks.

    stages 1, 2   a group's flat shards, rank by rank, are its parameters one after the other
    stage 3       each rank has its equal part of each parameter, the last one padded

Evaluation uses the moving average of the weights where there is one, so it is taken here too. Every file is checked
against the checkpoint's manifest, and read without executing anything.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from re2tal.backbones import take_parts_of
from re2tal.config import RunConfig, build_detector
from re2tal.data.contract.shards import FeatureSet, open_any, subset_folder
from re2tal.rewire import wiring_of
from re2tal.runs.folder import CHECKPOINTS_NAME
from re2tal.runs.stored_features import describe
from re2tal.training.export import ModelFile
from re2tal.training.manifest import FOLDER, CheckpointManifest, read_manifest

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
        except FileNotFoundError:
            if last == TRIES - 1 or checkpoint.is_dir():
                raise
        else:
            take_parts_of(network.backbone, weights)
            names = set(network.state_dict())
            weights = {name: value for name, value in weights.items() if name in names}
            model = ModelFile(checkpoint, weights, classes, wiring_of(network), features)
            return model, checkpoint.name
    raise AssertionError


def _newest_sound(folder: Path) -> tuple[Path, CheckpointManifest]:
    found = [path for path in folder.iterdir() if path.is_dir() and FOLDER.fullmatch(path.name)]
    faults = []
    for path in sorted(found, key=lambda one: int(one.name.split("-")[1]), reverse=True):
        try:
            return path, read_manifest(path)
        except ValueError as error:
            faults.append(f"{path.name}: {error}")
            print(f"passing over checkpoint {faults[-1]}", file=sys.stderr)
    if faults:
        raise ValueError(f"no checkpoint in {folder} is sound: {'; '.join(faults)}; train again")
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
    stage, ranks = int(manifest.run["ZeRO stage"]), int(manifest.run["number of ranks"])
    states = [_read(checkpoint / f"rank-{rank:05d}.pt") for rank in range(ranks)]
    kind = "zero_pp_rank_{}_mp_rank_00_model_states.pt" if stage == 3 else "mp_rank_00_model_states.pt"
    models = [_read(checkpoint / kind.format(rank)) for rank in range(ranks if stage == 3 else 1)]
    weights: dict[str, Tensor] = {} if stage == 3 else dict(models[0]["module"])
    weights |= states[0]["buffers"]
    if stage == 0:
        names = [name for name in models[0]["module"] if name not in states[0]["buffers"]]
        return _float(weights | _averages(checkpoint, states[0]["average"], names, weights) if averaged else weights)
    shards = [state["average"] for state in states] if averaged else list(_masters(checkpoint, stage, ranks))
    shapes: list[Mapping[str, torch.Size]] = models[0]["param_shapes"]
    if stage == 3:
        flats = [torch.cat([shard.flatten() for shard in of_rank]) for of_rank in shards]
        weights |= _of_parts(checkpoint, flats, {name: one for group in shapes for name, one in group.items()})
        frozen = models[0].get("frozen_param_shapes") or {}
        for name, shape in frozen.items():
            parts = [model["frozen_param_fragments"][name].flatten() for model in models]
            weights[name] = torch.cat(parts)[: shape.numel()].view(shape)
    else:
        for number, group in enumerate(shapes):
            flat = torch.cat([of_rank[number].flatten() for of_rank in shards])
            weights |= _of_flat(checkpoint, flat, group)
    return _float(weights)


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


def _masters(checkpoint: Path, stage: int, ranks: int) -> Iterator[list[Tensor]]:
    """The optimizer's float32 weights of each rank."""
    for rank in range(ranks):
        found = sorted(checkpoint.glob(f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"))
        if len(found) != 1:
            raise ValueError(f"{checkpoint} has {len(found)} files of the optimizer of rank {rank}, not one")
        state = _read(found[0])["optimizer_state_dict"]
        yield state["fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"]


def _of_flat(checkpoint: Path, flat: Tensor, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """Parameters that lie one after the other; padding follows."""
    total = sum(shape.numel() for shape in shapes.values())
    if not total <= len(flat):
        raise ValueError(f"{checkpoint} has {len(flat)} numbers for {total} of the weights")
    parts = flat[:total].split([shape.numel() for shape in shapes.values()])
    return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


def _of_parts(checkpoint: Path, flats: Sequence[Tensor], shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """Parameters of which each rank has an equal part, one after the other; the end of the last part is padding."""
    lengths = {name: -(-shape.numel() // len(flats)) for name, shape in shapes.items()}
    if any(len(flat) != sum(lengths.values()) for flat in flats):
        raise ValueError(f"{checkpoint} has {len(flats[0])} numbers a rank for {sum(lengths.values())} of the weights")
    parts = [flat.split(list(lengths.values())) for flat in flats]
    return {
        name: torch.cat([of_rank[number] for of_rank in parts])[: shape.numel()].view(shape)
        for number, (name, shape) in enumerate(shapes.items())
    }


def _float(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.float().contiguous() if value.is_floating_point() else value for name, value in weights.items()}


def _read(path: Path) -> Any:
    from re2tal.training.checkpoint_files import DurableCheckpointEngine  # imports DeepSpeed, which takes seconds

    return DurableCheckpointEngine().load(str(path), map_location="cpu")
