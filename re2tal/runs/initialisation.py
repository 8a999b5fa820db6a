"""A first configuration for own data: each setting follows from the videos, the annotations and the memory at hand.

videos, annotations -> facts (lengths, rates, classes) -> choices, each with its reason -> recipe.json
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import torch

from re2tal.backbones import BackboneConfig, build_backbone, is_of_the_library
from re2tal.backbones.weights import WEIGHTS_SUFFIXES
from re2tal.config import RunConfig, save_config
from re2tal.files import output_file
from re2tal.planning.free_memory import free_memory
from re2tal.runs.deepspeed_presets import DEFAULT_PRESET, find_preset
from re2tal.runs.devices import default_device
from re2tal.runs.initialisation_facts import DataFacts, look_at
from re2tal.runs.initialisation_settings import FILE_BACKBONE, Start, choose, largest_batches


@dataclass(frozen=True, slots=True)
class Initialised:
    """A configuration that was written."""

    config: RunConfig
    reasons: Sequence[tuple[str, str, str]]
    """Key, value, why."""
    notes: Sequence[str]
    """What about the data may disappoint."""
    commands: Sequence[str]
    """What to run next."""


def initialise(videos: Path, annotations: Path, named: Path, *, shards: Path | None, start: Start) -> Initialised:
    """Look at the data and write a configuration, called as `named`, that `re2tal train --config` takes.

    Raises ValueError, before anything is written, for data that nothing can be learnt from.
    """
    out = named
    if out.suffix != ".json":
        raise ValueError(f"--out is {out}; a configuration is a .json file, such as recipe.json")
    # A configuration may have been edited by hand.
    if out.exists():
        raise ValueError(f"{out} is there already; choose another name, or remove it")
    out = output_file(out, option="--out")
    _check_weights(start)
    data = look_at(videos, annotations)
    chosen = choose(data, start)
    shards = shards or out.parent / "shards"
    config = replace(chosen.config, name=out.stem, data=replace(chosen.config.data, shards=shards))
    config, batch = _batch(config, data, default_device())
    out.parent.mkdir(parents=True, exist_ok=True)
    save_config(out, config)
    rate = (
        f" --fps {chosen.stored_fps:g}" if chosen.stored_fps else f" --frames {config.data.clips.windowing.num_frames}"
    )
    build = ["re2tal", "shards", "build", "--videos", str(videos), "--annotations", str(annotations)]
    build += ["--out", str(shards), "--short-side", str(chosen.short_side)]
    train = ["re2tal", "train", "--config", str(named), "--out", f"runs/{config.name}"]
    commands = [shlex.join(build) + rate, shlex.join(train)]
    return Initialised(config, [*chosen.reasons, batch], data.notes, commands)


def _check_weights(start: Start) -> None:
    """FileNotFoundError for a file that is not there, ValueError for weights of another family or size. Of a folder or
    hub name only the config.json is read."""
    weights, name = start.weights, start.backbone or FILE_BACKBONE
    if weights is None:
        return
    if not is_of_the_library(name, weights) and not Path(weights).is_file():
        raise FileNotFoundError(
            f"--weights is {weights}, and there is no such file; {name} takes one of {', '.join(WEIGHTS_SUFFIXES)}: "
            "correct the path, or give --backbone the family that a folder or hub name is of"
        )
    with torch.device("cpu" if Path(weights).is_file() else "meta"):
        build_backbone(BackboneConfig(name=name, weights=weights, rewired=False))


def _batch(config: RunConfig, data: DataFacts, device: torch.device) -> tuple[RunConfig, tuple[str, str, str]]:
    """The largest batch whose step fits into the memory at hand, of those that leave an epoch some steps."""
    sizes = largest_batches(data.num_training)
    if config.backbone.weights is not None:
        sizes = [1]  # as the published recipes: clips are large
    # The count follows DeepSpeed's, which is there on Linux only.
    if not sys.platform.startswith("linux") or find_spec("deepspeed") is None:
        chosen = replace(config, engine=replace(config.engine, batch_size=sizes[0]))
        why = "what a step needs is not known here, without DeepSpeed; where you train, re2tal plan --config shows it"
        return chosen, ("engine.batch_size", str(sizes[0]), why)
    from re2tal.planning.choice import plan_step  # imports DeepSpeed

    free = free_memory(device)
    # From the largest down; the last is 1.
    for size in sizes:
        tried = replace(config, engine=replace(config.engine, batch_size=size))
        # Weights change no sizes, and are not read for the count.
        bare = replace(tried, backbone=replace(tried.backbone, weights=None, norm_eval=False))
        counted = plan_step(
            bare, find_preset(DEFAULT_PRESET), world_size=1, num_classes=len(data.classes), device=device
        )
        needed = counted.memory.peak
        if needed <= free:
            pieces = config.backbone.chunk_mebibytes
            cut = f"branches in pieces of {pieces} MiB, " if pieces else "branches whole, "
            why = f"a step needs {_gigabytes(needed)} of the {_gigabytes(free)} that are free on {device}; {cut}"
            return tried, ("engine.batch_size", str(size), why + "re2tal plan --config shows it by part")
    raise ValueError(
        f"a step with one clip needs {_gigabytes(needed)}, but {device} has {_gigabytes(free)} free; use a machine "
        "with more memory, or a smaller backbone (--backbone)"
    )


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
