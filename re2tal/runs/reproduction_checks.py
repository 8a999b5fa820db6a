"""What `re2tal reproduce` looks at before it trains: data, weights, machine, memory and time. Nothing is changed."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from re2tal.config import RunConfig
from re2tal.data.building.annotation_entries import duration_tolerance
from re2tal.data.building.annotations import read_database, read_video_ids
from re2tal.data.building.catalog import find_dataset
from re2tal.data.contract.shards import ShardSet, open_shards, subset_folder
from re2tal.distributed import World
from re2tal.evaluation.ground_truth import read_ground_truth
from re2tal.evaluation.video_classes import read_video_classes
from re2tal.files import sha256_of
from re2tal.runs.datasets import compare_with_facts
from re2tal.runs.detection import DetectionOptions
from re2tal.runs.devices import default_device
from re2tal.runs.tasks import build_model
from re2tal.runs.training_data import stream_of
from re2tal.strict_json import finite_number
from re2tal.structures import VideoRecord, find_subset
from re2tal.training.config import DTYPES
from re2tal.video_ids import composed, plain_id

MAX_NAMED = 10
TIMED_STEPS = 3
_HASH_IN_NAME = re.compile(r"[-_](?!(?:19|20)\d{6}\.)([0-9a-f]{8,64})\.(?:pth|pt|safetensors)$")
"""torch.hub and mmengine put the first digits of a file's SHA-256 at the end of its name; others a date."""


@dataclass(slots=True)
class Checked:
    """What was found, and what is wrong with it."""

    facts: dict[str, Any] = field(default_factory=dict)
    """For the card."""
    problems: list[str] = field(default_factory=list)
    """A sentence each. The score is not comparable, or training would not run, until each is solved or explained."""


def check_data(dataset: str, annotations: Path, shards: Path, blocked: Path | None) -> Checked:
    """Compare the annotation file with the published numbers, and the shards with the annotation file.

    Raises ValueError where one of them cannot be read, and where they have no video in common.
    """
    compared = compare_with_facts(dataset, annotations)
    checked = Checked(
        {
            "annotations": str(annotations),
            "sha256": sha256_of(annotations),
            "videos": compared.videos,
            "actions": compared.actions,
        },
        [f"annotations: {line}" for line in compared.differences],
    )
    left_out = blocked_videos(dataset, blocked)
    checked.facts["left out by a list"] = sorted(left_out)
    listed = _by_subset(annotations, compared.renamed)
    names = {new: old for old, new in compared.renamed.items()}
    for subset in ("training", "validation"):
        opened = open_shards(subset_folder(shards, subset))
        # A file may say "val", as may the folder.
        of_subset = listed.get(find_subset(subset, listed) or subset, {})
        wanted = {name: seconds for name, seconds in of_subset.items() if name not in left_out}
        seconds = sum(video.video_seconds for video in opened.videos)
        checked.facts[subset] = {"videos": len(opened.videos), "listed": len(wanted), "hours": round(seconds / 3600, 3)}
        # Without a common video all that follows would be a list of all of them.
        if not wanted.keys() & {composed(video_id) for video_id in opened.by_id}:
            raise ValueError(
                f"{shards} and {annotations} have no {subset} video in common; give the file they were built from"
            )
        blocked_there = sorted(left_out & {composed(video_id) for video_id in opened.by_id})
        # What is scored leaves them out; training does not.
        if blocked_there and subset == "validation":
            checked.facts[subset]["blocked, and not scored"] = len(blocked_there)
        elif blocked_there:
            checked.problems.append(
                f"{subset}: {len(blocked_there)} videos of the shards are blocked, and would be trained on; build them "
                f"with --blocked: {_some(blocked_there[:MAX_NAMED], len(blocked_there))}"
            )
        checked.problems += [f"{subset}: {line}" for line in _compare_shards(opened, wanted, left_out)]
        truths = read_ground_truth(annotations, subset=names.get(subset, subset))
        checked.problems += [f"{subset}: {line}" for line in _compare_actions(opened, truths)]
    checked.problems += _without_list(dataset, len(wanted))
    return checked


def _without_list(dataset: str, num_validation: int) -> Iterator[str]:
    """Whether published scores leave out validation videos that count here: only a list that people have says which."""
    spec = find_dataset(dataset)
    if spec.facts is None or not spec.facts.blocked or spec.blocked:
        return
    if num_validation > (fewest := min(spec.facts.subsets["validation"].videos)):
        yield f"validation: {num_validation} videos count, and published scores are of {fewest}: {spec.facts.blocked}"


def blocked_videos(dataset: str, blocked: Path | None) -> frozenset[str]:
    """Ids that are neither trained on nor scored: those of the catalog, and those of a list."""
    extra = read_video_ids(blocked) if blocked else frozenset()
    return find_dataset(dataset).blocked | {plain_id(one) for one in extra}


def _by_subset(path: Path, renamed: dict[str, str] | Any) -> dict[str, dict[str, float | None]]:
    """Subset as recipes call it -> id -> seconds, where the file says them."""
    found: dict[str, dict[str, float | None]] = {}
    for key, entry in read_database(path).items():
        subset = str(entry["subset"]).lower()
        seconds = finite_number(entry.get("duration"))
        if seconds is None and "duration" in entry:
            raise ValueError(f"{path}: database.{key[:100]!r}.duration is {entry['duration']!r}; give seconds")
        found.setdefault(renamed.get(subset, subset), {})[composed(plain_id(key))] = seconds
    return found


def _compare_shards(opened: ShardSet, wanted: dict[str, float | None], left_out: frozenset[str]) -> Iterator[str]:
    there = {composed(video_id): video for video_id, video in opened.by_id.items()}
    reasons = {composed(one.video_id): one.reason for one in opened.manifest.rejected}
    if missing := sorted(set(wanted) - set(there)):
        shown = [f"{name} ({reasons[name]})" if name in reasons else name for name in missing[:MAX_NAMED]]
        yield f"{len(missing)} of {len(wanted)} listed videos are not in the shards: {_some(shown, len(missing))}"
    if extra := sorted(set(there) - set(wanted) - left_out):
        yield f"{len(extra)} videos of the shards are not listed: {_some(extra[:MAX_NAMED], len(extra))}"
    other = [
        f"{name} lasts {video.video_seconds:.2f} s, listed {seconds:.2f} s"
        for name, video in there.items()
        if (seconds := wanted.get(name)) is not None
        and abs(video.video_seconds - seconds) > duration_tolerance(seconds)
    ]
    if other:
        yield f"{len(other)} videos have another length: {_some(other[:MAX_NAMED], len(other))}"
    if opened.manifest.damaged:
        yield f"{len(opened.manifest.damaged)} videos are damaged"


def _compare_actions(opened: ShardSet, truths: Sequence[VideoRecord]) -> Iterator[str]:
    """Whether videos of the shards have the actions that the file lists for them: label and start."""
    there = {composed(video_id): video.record for video_id, video in opened.by_id.items()}
    other = []
    for truth in truths:
        if (record := there.get(composed(plain_id(truth.video_id)))) is not None:
            ours, theirs = (
                # Tenths of a second: builds and files round times differently, and starts are clipped to the video.
                Counter((one.label, round(max(one.start_seconds, 0.0), 1)) for one in actions)
                for actions in (record.actions, truth.actions)
            )
            if ours != theirs:
                more, less = (ours - theirs).total(), (theirs - ours).total()
                other.append(f"{record.video_id} has {more} that the file lacks, and lacks {less}")
    if other:
        yield f"{len(other)} videos have other actions than in the file: {_some(other[:MAX_NAMED], len(other))}"


def _some(shown: list[str], number: int) -> str:
    return "; ".join(shown) + (f" and {number - len(shown)} more" if number > len(shown) else "")


def check_weights(path: Path | None, config: RunConfig, classes: tuple[str, ...]) -> Checked:
    """The file's checksum, compared with that in its name where it has one; and that the backbone can read it.

    Raises ValueError for a file that is missing or does not fit.
    """
    if path is None:
        return Checked({}, ["weights: none were given, so the backbone would start from random weights"])
    if not path.is_file():
        raise ValueError(f"--weights {path} is not a file; give the pretrained backbone's .pth or .safetensors")
    checksum = sha256_of(path)
    checked = Checked({"file": str(path), "sha256": checksum, "bytes": path.stat().st_size})
    named = _HASH_IN_NAME.search(path.name)
    if named is None:
        checked.facts["published checksum"] = "none known"
    elif checksum.startswith(named[1]):
        checked.facts["published checksum"] = f"{named[1]}, in its name: equal"
    else:
        raise ValueError(
            f"--weights {path} has SHA-256 {checksum[:16]}..., but its name says {named[1]}; download it again, or "
            "rename it if it was changed on purpose"
        )
    build_model(config, classes)  # refuses weights that do not fit, by name
    return checked


def check_video_classes(path: Path | None, shards: Path) -> Checked:
    """The file that names what is found; ValueError, before any training, for one that will not do."""
    if path is None:
        return Checked({}, ["no --video-classes: actions cannot be named, so their score is of another task"])
    namer = read_video_classes(path)
    opened = open_shards(subset_folder(shards, "validation"))
    namer.check(opened.by_id, top_k=DetectionOptions().top_k)
    checked = Checked({"file": str(path), "sha256": sha256_of(path), "classes": len(namer.classes)})
    if unnamed := sorted(set(opened.classes) - set(namer.classes)):
        checked.problems.append(
            f"{path} lacks {len(unnamed)} of the {len(opened.classes)} classes of the data, which will never be found: "
            f"{_some(unnamed[:MAX_NAMED], len(unnamed))}"
        )
    return checked


def check_machine(world: World) -> Checked:
    """The devices of this machine, and how many ranks there are."""
    device = default_device()
    facts: dict[str, Any] = {"ranks": world.world_size, "device": device.type, "torch": torch.__version__}
    if device.type != "cuda":
        return Checked(facts, ["machine: there is no accelerator"] if device.type == "cpu" else [])
    every = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    facts["devices"] = [f"{one.name}, {one.total_memory / 2**30:.0f} GiB" for one in every]
    return Checked(facts)


def estimate_hours(config: RunConfig, shards: Path, world: World, *, on_cpu: bool) -> dict[str, Any]:
    """Hours of training, from timed steps of one rank without optimizer, loader and communication.

    On a CPU only where `on_cpu` allows it: the published sizes take minutes a step there.
    """
    device = default_device()
    if device.type == "cpu" and not on_cpu:
        return {"hours": None, "reason": "unknown: there is no accelerator to time a step on"}
    if device.type != "cpu":
        device = torch.device(device.type, world.device_index)
    opened = open_shards(subset_folder(shards, "training"))
    batches = stream_of(config, opened, world, training=True).steps_per_epoch
    network = build_model(config, opened.classes).to(device, DTYPES[config.engine.precision])
    try:
        # The first step also loads kernels, and is not counted; the fastest of the others had the fewest neighbours.
        seconds = min(islice(_step_seconds(network, config, device), 1, TIMED_STEPS))
    # Said, and no error: with a plan (engine.memory_budget_gb) the same step may fit.
    except torch.OutOfMemoryError:
        return {"hours": None, "reason": "unknown: a step does not fit into this device's memory"}
    hours = seconds * batches * config.training.epochs / 3600
    return {"hours": round(hours, 4), "seconds a batch": round(seconds, 4), "batches an epoch": batches}


def _step_seconds(network: torch.nn.Module, config: RunConfig, device: torch.device) -> Iterator[float]:
    """Of a forward and a backward on noise, again and again."""
    clips, batch = config.data.clips, config.engine.batch_size
    num_frames, dtype = clips.windowing.num_frames, DTYPES[config.engine.precision]
    shape = (batch, 3, num_frames, clips.size, clips.size)
    mask = torch.ones(batch, num_frames, dtype=torch.bool, device=device)
    synchronize = (lambda: None) if device.type == "cpu" else torch.accelerator.synchronize
    while True:
        synchronize()
        start = time.perf_counter()
        outputs = network(torch.randn(shape, device=device, dtype=dtype), mask)
        torch.stack([one.float().sum() for one in tree_leaves(outputs) if one.requires_grad]).sum().backward()
        synchronize()
        yield time.perf_counter() - start
